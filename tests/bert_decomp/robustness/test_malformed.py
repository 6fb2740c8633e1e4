"""Broken and hostile files end in one line and exit code 2, run no code, and take no more time or memory than others.

The long form, with every case, is ``python -m tests.robustness.malformed``.
"""

import ast
import json
import random
from pathlib import Path

import pytest
from tiny_models import tiny_batch, tiny_model

from bert_decomp.errors import UserError
from bert_decomp.models.selection import select_linears
from bert_decomp.statistics import Statistics, collect_statistics
from lowrank_kernels.tuning import measured
from tests.robustness.damage import table
from tests.robustness.fuzz import TARGETS, corpus
from tests.robustness.malformed import Judge
from tests.robustness.malformed_cases import cases
from tests.robustness.malformed_runs import statistics_cases

ROOT = Path(__file__).parents[3]
ALL = {f"{case.kind} {case.name}": case for case in cases() if case.main != "export"}
# What once ended in a traceback, a crash, a hang, much memory, or wrong results without a word; and what must keep
# working.
CHOSEN = {
    "model": (
        "config.json-deep-objects",
        "config.json-key-twice",
        "config.json-a-pipe",
        "config.json-a-link-out",
        "rank-true",
        "weights-header-name-twice",
        "weights-nan",
        "weights-int",
        "weights-turned",
        "index-out-of-the-folder",
        "pickle-alone",
        "pickle-beside",
        "rank-10^400",
        "config-layers-10^18",
        "config-vocabulary-10^9",
        "config-labels-10^9",
        "config-labels-gap",
        "config-heads-0",
        "config-heads-negative",
        "tokenizer-no-padding",
        "config-attention-from-a-hub",
        "remote-code",
        "remote-code-of-unknown-type",
        "adapter",
        "tokenizer-ids-beyond",
        "tokenizer-inputs-without-mask",
    ),
    "int8": (
        "codes-unsigned",
        "header-header-name-of-a-path",
        "range-nan",
        "one-module-gone",
        "outliers-gone",
        "rank-10^400",
        "format-2",
    ),
    "plan": (
        "deep-lists",
        "key-twice",
        "loss-text",
        "matrices-none",
        "dense-of-another-model",
        "name-with-escapes",
        "version-true",
    ),
    "table": ("deep-lists", "backend-unknown", "tile-block-10^18", "rows-0", "times-text", "crlf"),
    "options": (
        "deep-lists",
        "length-text",
        "batch-0",
        "nul-in-a-path",
        "surrogate-in-a-path",
        "yaml-laughs",
        "yaml-twice",
        "yaml-code",
    ),
    "data": (
        "jsonl-deep-lists",
        "csv-a-zip-bomb",
        "parquet-three-million-rows",
        "csv-nul",
        "jsonl-cut-0.3",
        "jsonl-lists",
        "jsonl-mixed",
        "jsonl-names-100000",
        "csv-columns-100000",
        "csv-one-line-of-megabytes",
        "csv-huge-field",
        "name-with-brackets",
        "csv-bzip2",
    ),
}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return Judge(tmp_path_factory.mktemp("malformed"), seed=1, runs=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"{kind} {name}" for kind, names in CHOSEN.items() for name in names]
)
def test_a_malformed_file_is_one_line_or_harmless(judge, name):
    case = ALL[name]
    honest = ALL[
        "model undamaged" if case.main in ("run", "evaluate") else f"{case.kind} undamaged"
    ]
    verdict = judge.judge(case, honest)
    assert verdict.verdict == {"refused": "refused", "harmless": "harmless"}.get(
        case.expect, verdict.verdict
    ), verdict.detail
    assert verdict.verdict in ("refused", "harmless"), verdict.detail


def test_every_damage_to_statistics_is_seen(tmp_path):
    model = tiny_model("bert")
    path = tmp_path / "base" / "stopped" / "statistics.safetensors"
    collect_statistics(
        model, [tiny_batch()], select_linears(model), needs=("inputs", "gradients"), progress=False
    ).save(path)
    whole = path.read_bytes()
    for case in statistics_cases():
        if case.expect == "refused" and not case.name.startswith(
            ("run.json", "fingerprint-other", "source-of")
        ):
            path.write_bytes(whole)
            case.lay(tmp_path / "base", tmp_path / case.name, random.Random(1))
            with pytest.raises(UserError):
                Statistics.load(tmp_path / case.name / "out" / path.name)
                print(case.name)


def test_a_damaged_table_is_not_added_to(tmp_path):
    path = tmp_path / "gpu.json"
    assert measured(path) == {}
    path.write_text(json.dumps(table()))
    assert measured(path) == table()["entries"]
    path.write_text(json.dumps({**table(), "version": 1}))
    with pytest.raises(ValueError, match="no tuning table"):
        measured(path)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_the_fuzzers_corpus_finds_nothing(target):
    found = corpus(target)
    assert found
    for data in found:
        TARGETS[target](data)


# By their last names: modules that unpickle or run what they read, builtins, and functions of modules.
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "code",
}
FORBIDDEN_NAMES = {"eval", "exec", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    "torch.load",
    "torch.jit.load",
    "torch.package",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "builtins.eval",
    "builtins.exec",
}
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}


def forbidden(source):
    """What in a Python source could run code out of a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ({alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ({node.module.split(".")[0]} & FORBIDDEN_MODULES)
            yield from (
                {f"{node.module}.{alias.name}" for alias in node.names} & FORBIDDEN_ATTRIBUTES
            )
        elif isinstance(node, ast.Name):
            yield from ({node.id} & FORBIDDEN_NAMES)
        elif isinstance(node, ast.Attribute):
            yield from ({ast.unparse(node)} & FORBIDDEN_ATTRIBUTES)
        elif isinstance(node, ast.keyword) and not (
            isinstance(node.value, ast.Constant) and node.value.value is False
        ):
            yield from ({node.arg} & FORBIDDEN_KEYWORDS)


@pytest.mark.slow
def test_nothing_runs_what_it_reads():
    files = [
        path
        for folder in ("bert_decomp", "lowrank_kernels", "benchmarks", "tests", "csrc")
        for path in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 50
    found = {
        str(path.relative_to(ROOT)): names
        for path in files
        if (names := set(forbidden(path.read_text(encoding="utf-8"))))
    }
    # Round trips include what a process sends to another: a model made in the test, never a file.
    assert found == {
        "tests/bert_decomp/models/test_round_trips.py": {"pickle"},
        "tests/bert_decomp/runtime/test_packing.py": {"pickle"},
    }
    for source in (
        "import pickle",
        "from torch import load",
        "torch.load(f)",
        "eval('1')",
        "f = exec",
        "run('x', shell=True)",
        "load(x, trust_remote_code=flag)",
        "yaml.load(f)",
        "import os; os.system('x')",
    ):
        assert set(forbidden(source)), source
    assert not set(forbidden("model.eval(); load(x, trust_remote_code=False); torch.loaded"))
