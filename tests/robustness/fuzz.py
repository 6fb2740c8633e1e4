"""Coverage-guided fuzzing of what reads plans, tuning tables and low-rank configs: ``python -m tests.robustness.fuzz``.

Needs atheris (pip install atheris). Each target runs for ``--seconds`` in a process of its own, from the committed
corpus; any exception but the documented one is a finding. What is worth keeping of the inputs found, minimised and cut
to a few kilobytes, replaces ``corpus/TARGET.json``, which the tests replay without atheris.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORPUS = Path(__file__).with_name("corpus")
# Bytes of a target's committed corpus, and of the longest input tried.
KEPT, LONGEST = 4000, 1024
WORDS = (
    '"version"',
    '"matrices"',
    '"in_features"',
    '"out_features"',
    '"rank"',
    '"expected_loss"',
    '"entries"',
    '"backend"',
    '"tile"',
    '"milliseconds"',
    '"block_m"',
    '"warps"',
    '"torch"',
    '"modules"',
    '"bias"',
    '"quant_method"',
    '"low_rank"',
    '"quantization_config"',
    '"id2label"',
    '"num_labels"',
    '"architectures"',
    "null",
    "true",
    "1",
    "-1",
    "1e999",
    "NaN",
    "1000000000000000000",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    "\\\\ud800",
    "linear/float32/k1/n1/f0/r1/m1",
)

NAMES = [word[1:-1] for word in WORDS if word.startswith('"') and len(word) > 2] + [
    "",
    "x",
    "../x",
    "linear/float32/k1/n1/f0/r1/m1",
]
ATOMS = [
    None,
    True,
    False,
    0,
    1,
    -1,
    5,
    64,
    10**18,
    10**400,
    0.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\ud800",
    "torch",
    "low_rank",
    [],
    {},
    [1],
    {"rank": 1, "bias": True},
]


def _plan(data: bytes) -> None:
    from bert_decomp.errors import UserError
    from bert_decomp.io.json import parse_json
    from bert_decomp.planning import RankPlan

    try:
        plan = RankPlan.from_dict(parse_json(data.decode("utf-8-sig"), "the input"))
    except (UserError, UnicodeDecodeError):
        return
    # What is accepted can be used and written.
    assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.encoder_fraction > 0 and plan.flops > 0


def _table(data: bytes) -> None:
    import torch

    from lowrank_kernels import tuning
    from lowrank_kernels.problem import Problem

    try:
        table = tuning.parse(data.decode("utf-8-sig"), "the input")
    except (tuning.TableError, UnicodeDecodeError):
        return
    for problem in (
        Problem("linear", 1, 768, 768, 128, torch.bfloat16),
        Problem("linear", 3, 1, 1, 1, torch.float32),
    ):
        table.find(problem)


def _config(data: bytes) -> None:
    from bert_decomp.errors import UserError
    from bert_decomp.io.json import parse_json
    from bert_decomp.models.guards import check_config
    from bert_decomp.models.saving import LowRankConfig

    try:
        values = parse_json(data.decode("utf-8-sig"), "the input")
        check_config(values, "the input")
        if values.get("quantization_config") is not None:
            config = LowRankConfig.from_dict(values["quantization_config"])
            assert LowRankConfig.from_dict(config.to_dict()).modules == config.modules
    except (UserError, UnicodeDecodeError):
        return


TARGETS: dict[str, Callable[[bytes], None]] = {"plan": _plan, "table": _table, "config": _config}


def corpus(target: str) -> list[bytes]:
    """The committed inputs of a target."""
    return [
        text.encode("latin-1")
        for text in json.loads((CORPUS / f"{target}.json").read_text(encoding="utf-8"))
    ]


def _changed(value: Any, draw: random.Random) -> Any:
    """Plain values with one of them replaced, dropped or put under another name."""
    if not isinstance(value, (dict, list)) or not value or draw.random() < 0.15:
        return draw.choice(ATOMS)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    inner = value[key]
    kind = draw.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[draw.choice(NAMES)] = value.pop(key)
    elif kind < 0.3 and isinstance(value, dict):
        value[draw.choice(NAMES)] = draw.choice(ATOMS)
    else:
        value[key] = _changed(inner, draw)
    return value


def _mutator(data: bytes, longest: int, seed: int) -> bytes:
    """Mostly valid JSON with another value somewhere; else libFuzzer's own change of the bytes."""
    import atheris

    draw = random.Random(seed)
    try:
        if draw.random() < 0.3:
            return atheris.Mutate(data, longest)
        return json.dumps(_changed(json.loads(data), draw)).encode()[:longest]
    except (ValueError, RecursionError):
        return atheris.Mutate(data, longest)


def _child(target: str, arguments: list[str]) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(
        include=[
            "bert_decomp.io.json",
            "bert_decomp.planning.plan",
            "bert_decomp.models.guards",
            "bert_decomp.models.saving",
            "lowrank_kernels.tuning",
            "lowrank_kernels.triton_backend.tiles",
        ]
    ):
        for name in ("bert_decomp.models.saving", "lowrank_kernels.tuning"):
            importlib.import_module(name)
    atheris.Setup([sys.argv[0], *arguments], TARGETS[target], custom_mutator=_mutator)
    atheris.Fuzz()


def _run(target: str, *arguments: str) -> str:
    """libFuzzer with these arguments in a process of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.robustness.fuzz", "--child", target, *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return done.stdout + done.stderr


def minimised(target: str, found: list[bytes]) -> list[bytes]:
    """The shortest inputs that together reach every line that the given ones reach, as far as ``KEPT`` bytes allow."""
    reached: set[tuple[str, int]] = set()
    now: set[tuple[str, int]] = set()

    def trace(frame: Any, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if "bert_decomp" not in name and "lowrank_kernels" not in name:
            return None
        if event == "line":
            now.add((name, frame.f_lineno))
        return trace

    kept, size = [], 0
    TARGETS[target](b"{}")  # imports are not what an input reaches
    for data in sorted(found, key=len):
        now.clear()
        sys.settrace(trace)
        with contextlib.suppress(Exception):  # a finding is kept elsewhere
            TARGETS[target](data)
        sys.settrace(None)
        if now - reached and size + len(data) <= KEPT:
            kept, size = [*kept, data], size + len(data)
            reached |= now
    return kept


def fuzz(target: str, seconds: int, seed: int) -> dict[str, Any]:
    """Fuzz a target from its committed corpus and replace that corpus; what goes into the result file."""
    with tempfile.TemporaryDirectory() as name:
        folders = {part: Path(name) / part for part in ("found", "crashes")}
        for folder in folders.values():
            folder.mkdir()
        for number, data in enumerate(corpus(target)):
            (folders["found"] / f"seed-{number}").write_bytes(data)
        words = Path(name) / "words"
        words.write_text("".join('"' + re.sub(r'(["\\])', r"\\\1", word) + '"\n' for word in WORDS))
        said = _run(
            target,
            str(folders["found"]),
            f"-max_total_time={seconds}",
            f"-seed={seed}",
            f"-max_len={LONGEST}",
            "-timeout=10",
            f"-dict={words}",
            f"-artifact_prefix={folders['crashes']}/",
            "-print_final_stats=1",
            "-rss_limit_mb=4096",
        )
        kept = minimised(target, [path.read_bytes() for path in folders["found"].iterdir()])
        crashes = [
            path.read_bytes().decode("latin-1") for path in sorted(folders["crashes"].iterdir())
        ]
    calls = re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)
    covered = re.findall(r"cov: (\d+)", said)
    if not calls:
        raise SystemExit(f"the fuzzer did not end as it should: {said[-2000:]}")
    (CORPUS / f"{target}.json").write_text(
        json.dumps([data.decode("latin-1") for data in kept], indent=0) + "\n", encoding="utf-8"
    )
    reason = [
        line
        for line in said.splitlines()
        if "Uncaught" in line or re.match(r"[\w.]+(Error|Exception)\b", line)
    ]
    return {
        "seconds": seconds,
        "calls": int(calls[-1]),
        "coverage_points": int(covered[-1]) if covered else None,
        "kept_inputs": len(kept),
        "kept_bytes": sum(map(len, kept)),
        "findings": crashes,
        "reasons": reason[:5],
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], sys.argv[3:])
    from benchmarks.records import save_record, suite_file

    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness.fuzz", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--target", choices=sorted(TARGETS), action="append", help="only these (default: all)"
    )
    parser.add_argument("--seconds", type=int, default=300, help="for each target")
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--output", type=Path, default=suite_file("robustness"))
    options = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print("error: fuzzing needs atheris; pip install atheris", file=sys.stderr)
        raise SystemExit(2)
    from tqdm.auto import tqdm

    from bert_decomp.io.environment import environment

    print(f"seed {options.seed}")
    found = {}
    for target in (bar := tqdm(options.target or sorted(TARGETS), unit="target")):
        bar.set_postfix_str(target)
        found[target] = fuzz(target, options.seconds, options.seed)
        tqdm.write(f"{target}: {json.dumps(found[target])[:1500]}")
    save_record(
        options.output,
        "fuzz",
        {
            "options": {"seconds": options.seconds, "seed": options.seed},
            "targets": found,
            "findings": sum(len(entry["findings"]) for entry in found.values()),
            "environment": environment(),
        },
    )
    if any(entry["findings"] for entry in found.values()):
        raise SystemExit("there are findings")


if __name__ == "__main__":
    main()
