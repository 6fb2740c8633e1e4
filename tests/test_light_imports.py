"""What a fresh process imports: lowrank_kernels needs torch alone, and --help needs neither torch nor transformers."""

import subprocess
import sys

import pytest

REPORT = "import sys; print('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"


def modules_after(*codes: str) -> list[set[str]]:
    """Top-level packages in ``sys.modules`` after each of ``codes``, which run one after another in a fresh process."""
    program = "\n".join(f"{code}\n{REPORT}" for code in codes)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("MODULES ")]
    return [set(line.split()[1:]) for line in lines]


@pytest.mark.slow
def test_the_operators_need_torch_alone():
    """numpy is no dependency either: torch imports it by itself where it is installed."""
    before, after = modules_after("import torch", "import lowrank_kernels")
    heavy = {
        "transformers",
        "datasets",
        "safetensors",
        "triton",
        "scipy",
        "sklearn",
        "yaml",
        "tqdm",
    }
    extra = after - before
    assert "lowrank_kernels" in extra and not extra & heavy


@pytest.mark.parametrize(
    "command", ["", "compress", "evaluate", "export", "predict", "report", "serve"]
)
def test_help_imports_neither_torch_nor_transformers(command):
    arguments = [command, "--help"] if command else ["--help"]
    (modules,) = modules_after(
        "from bert_decomp.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as stop: assert not stop.code"
    )
    assert not modules & {"torch", "transformers", "datasets", "matplotlib"}


# Each child imports a module as its first of this package, and torch, which takes as long, is there already.
FIRST = """
import os, sys
import torch
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        __import__(f"bert_decomp.models.{name}")
        assert "transformers" in sys.modules
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.slow
def test_a_module_of_the_format_can_be_the_first_import():
    """Each is imported by what importing transformers' models registers, and imports them itself."""
    names = ["format", "nested", "nested_resized", "resized", "resized_entries"]
    done = subprocess.run(
        [sys.executable, "-c", FIRST, *names], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_public_names_need_no_package_of_the_report():
    (modules,) = modules_after("import bert_decomp")
    assert not modules & {"matplotlib", "jinja2", "onnx", "pandas"}
