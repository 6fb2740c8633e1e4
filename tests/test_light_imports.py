"""What a fresh process imports: lowrank_kernels needs torch alone, and --help needs neither torch nor transformers."""

import subprocess
import sys

import pytest


def modules_after(code: str) -> set[str]:
    """Top-level packages in ``sys.modules`` after ``code`` ran in a fresh process."""
    report = (
        "import sys; print('MODULES', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    return set(result.stdout.rpartition("MODULES ")[2].split())


def test_the_operators_need_torch_alone():
    """numpy is no dependency either: torch imports it by itself where it is installed."""
    before = modules_after("import torch")
    extra = modules_after("import lowrank_kernels") - before
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
    assert "lowrank_kernels" in extra and not extra & heavy


@pytest.mark.parametrize(
    "command", ["", "compress", "evaluate", "export", "predict", "report", "serve"]
)
def test_help_imports_neither_torch_nor_transformers(command):
    arguments = [command, "--help"] if command else ["--help"]
    modules = modules_after(
        "from bert_decomp.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as stop: assert not stop.code"
    )
    assert not modules & {"torch", "transformers", "datasets", "matplotlib"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["format", "nested", "nested_resized", "resized"])
def test_a_module_of_the_format_can_be_the_first_import(name):
    """Each is imported by what importing transformers' models registers, and imports them itself."""
    assert "transformers" in modules_after(f"import bert_decomp.models.{name}")


def test_the_public_names_need_no_package_of_the_report():
    assert not modules_after("import bert_decomp") & {"matplotlib", "jinja2", "onnx", "pandas"}
