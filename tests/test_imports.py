"""The packages' layers: imports go down the list, never up and never in a circle.

The imports are read from the source, so that those inside functions and under ``TYPE_CHECKING`` count as well.
"""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# From the lowest to the highest: a part may import what stands before it.
LAYERS = {
    "lowrank_kernels": (
        "strict_json",
        "problem",
        "activations",
        "alignment",
        "checks",
        "measure",
        "backends",
        "tuning",
        "reference",
        "triton_backend",
        "cuda_backend",
        "dispatch",
        "operators",
        "modules",
        "layers",
        "inference",
        "cpu",
        "rivals",
        "env",
        "calibration",
        "tools",
    ),
    "bert_decomp": (
        "errors",
        "extras",
        "registration",
        "io",
        "data",
        "kinds",
        "models",
        "statistics",
        "methods",
        "config",
        "planning",
        "units",
        "runtime",
        "evaluation",
        "exporting",
        "engines",
        "decomposition",
        "distillation",
        "prediction",
        "serving",
        "pipeline",
        "cli",
    ),
}
# Run with ``python -m`` alone. In bert_decomp they would otherwise take the place of the functions of the same names.
ENTRIES = {
    "bert_decomp.run",
    "bert_decomp.evaluate",
    "bert_decomp.export",
    "lowrank_kernels.tune",
}


@cache
def modules(package):
    """Every module of ``package`` by qualified name, parsed."""
    trees = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = (path, ast.parse(path.read_text(encoding="utf-8")))
    return trees


def imports(name, path, tree, known):
    """The modules among ``known`` that the module ``name`` imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                # A package's own ``.`` is itself, a module's is its package.
                up = node.level - (path.name == "__init__.py")
                base = ".".join([*parts[: len(parts) - up], *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return {target for target in found if target in known and target != name}


@cache
def graph(package):
    trees = modules(package)
    return {name: imports(name, *tree, set(trees)) for name, tree in trees.items()}


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_no_module_imports_itself_by_way_of_others(package):
    # The package's own __init__ only says where the public names live, and a subpackage's what is public in it.
    edges = {
        name: targets - {package} for name, targets in graph(package).items() if name != package
    }
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_imports_go_down_the_layers(package):
    order = LAYERS[package]
    up = []
    for name, targets in graph(package).items():
        if name == package or name in ENTRIES:
            continue
        part = name.split(".")[1]
        assert part in order, f"{part} has no place among the layers"
        for target in targets - {package}:
            if order.index(target.split(".")[1]) > order.index(part):
                up.append(f"{name} imports {target}")
    assert not up, "\n".join(up)


def test_the_operators_know_nothing_of_bert_decomp():
    for name, (_, tree) in modules("lowrank_kernels").items():
        imported = {
            alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {part.split(".")[0] for part in imported} & {"bert_decomp", "transformers"}, name


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_nothing_imports_what_is_run_with_python_m(package):
    for name, targets in graph(package).items():
        assert not targets & ENTRIES, name


def option_names():
    """The command line's options: the fields of its dataclasses, and what its parsers add."""
    names = set()
    for name, (_, tree) in modules("bert_decomp").items():
        if name != "bert_decomp.config" and name.split(".")[1:2] not in (["pipeline"], ["cli"]):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                fields = (item for item in node.body if isinstance(item, ast.AnnAssign))
                names |= {item.target.id for item in fields}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= set(re.findall(r"^--(\w+)$", node.value))
    # pip and hf have an option of that name, too.
    return names - {"include"}


def test_the_library_speaks_of_arguments_and_not_of_flags():
    """A string with ``--name`` in it, name an option of the command line, belongs to the command line."""
    options, flags = option_names(), []
    assert {"encoder_fraction", "max_seq_length", "output_dir"} <= options
    for name, (path, tree) in modules("bert_decomp").items():
        if name in ENTRIES or name.split(".")[1:2] in (["pipeline"], ["cli"]):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                mentioned = set(re.findall(r"--(\w+)", node.value)) & options
                if mentioned:
                    flags.append(f"{path.relative_to(ROOT)}:{node.lineno}: {sorted(mentioned)}")
    assert not flags, "\n".join(flags)


def test_the_checks_above_see_circles_arrows_up_and_relative_imports():
    trees = {
        "p": ("__init__.py", "from .low import a"),
        "p.low": ("__init__.py", "from .one import a"),
        "p.low.one": ("one.py", "def f():\n    from ..high import two"),
        "p.high": ("__init__.py", ""),
        "p.high.two": ("two.py", "from ..low.one import a\nimport p.low"),
    }
    edges = {
        name: imports(name, Path(file), ast.parse(text), set(trees))
        for name, (file, text) in trees.items()
    }
    assert edges == {
        "p": {"p.low"},
        "p.low": {"p.low.one"},
        "p.low.one": {"p.high.two"},
        "p.high": set(),
        "p.high.two": {"p.low.one", "p.low"},
    }
    with pytest.raises(CycleError):
        TopologicalSorter(edges).prepare()
