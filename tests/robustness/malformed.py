"""Broken and hostile files: ``python -m tests.robustness.malformed [--seed S] [--kinds model plan] [--only PATTERN]``.

Every case of ``malformed_cases`` (valid files of seven kinds, damaged by a seeded generator or by hand) goes through
the command that a user would call, in a forked process of its own. It must end within 10 seconds beyond what the
undamaged files take, with exit code 2 and one line on standard error (or with success, where the damage is harmless);
grow by no more memory than the undamaged files make it grow and twice the files' size; write nothing outside of the
output folder; and run no code: a canary file would tell. A sample of the cases is repeated as true commands.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm.auto import tqdm

from benchmarks.records import save_record, suite_file
from bert_decomp.cli import compress, evaluate, export
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.io.environment import environment
from bert_decomp.io.json import write_json
from bert_decomp.models.saving import save
from bert_decomp.runtime import fuse_
from lowrank_kernels import tuning
from tests.bert_decomp.tiny_models import tiny_batch, tiny_model, tiny_tokenizer, write_csv

from .confined import PATIENCE, Main, Outcome, execute, tree
from .damage import Case, run_line, table
from .malformed_cases import cases

SECONDS = 10.0
# What the allocator and lazily loaded libraries may take in one case and not in another.
NOISE = 48 * 2**20
NAMES = {
    "num_labels": 2,
    "id2label": {0: "plain", 1: "coloured"},
    "label2id": {"plain": 0, "coloured": 1},
}


def _load_table(argv: list[str]) -> None:
    """What the first operator call on a GPU does: no command reads a table where there is no GPU."""
    os.environ[tuning.ENVIRONMENT] = argv[0]
    print(tuning.load(tuning.Gpu("Some GPU", "8.0", 108)))


MAINS: dict[str, Main] = {
    "evaluate": evaluate.main,
    "run": compress.main,
    "export": export.main,
    "table": _load_table,
}


def prepare(root: Path) -> Path:
    """Valid files in ``root``/base: dense, low-rank and int8 models, texts, a tuning table, a plan."""
    torch.set_num_threads(1)
    base = root / "base"
    base.mkdir(parents=True)
    model = tiny_model("bert", **NAMES)
    save(model, tiny_tokenizer(), base / "dense")
    plan = decompose_(model, DecompositionConfig("svd", rank=5), progress=False)
    write_json(base / "whole" / "plan.json", plan.to_dict())
    save(model, tiny_tokenizer(), base / "model")
    save(fuse_(model, dtype="int8", calibration=[tiny_batch()]), tiny_tokenizer(), base / "int8")
    write_csv(base / "train.csv", 24)
    write_csv(base / "dev.csv", 12, seed=1)
    (base / "tables").mkdir()
    (base / "tables" / "some_gpu.json").write_text(json.dumps(table()))
    return base


def prepare_run(root: Path) -> None:
    """A run stopped after its statistics in ``root``/base/stopped, and what it came to in ``root``/base/run."""
    base = root / "base"
    outcome = execute(MAINS["run"], run_line(base, base / "run"), root)
    if outcome.code:
        raise SystemExit(f"the undamaged run failed: {outcome.errors}")
    (base / "stopped").mkdir()
    for name in ("run.json", "statistics.safetensors"):
        shutil.copy(base / "run" / name, base / "stopped" / name)


@dataclass
class Verdict:
    """What became of a case: ``refused``, ``harmless``, or what went wrong."""

    kind: str
    name: str
    verdict: str
    detail: str
    seconds: float
    grown: int


class Judge:
    """Runs cases below ``root`` and compares each with what undamaged files take; those of statistics need ``runs``."""

    def __init__(self, root: Path, seed: int, runs: bool = True):
        self.root, self.seed = root, seed
        self.base = prepare(root)
        if runs:
            prepare_run(root)
        self.honest: dict[str, Outcome] = {}

    def lay_out(self, case: Case) -> tuple[Path, list[str], int]:
        """The case's folder, its command line, and how many bytes of input it has."""
        folder = self.root / "cases" / f"{case.kind}-{case.name}".replace("/", "_")[:80]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        argv = case.lay(self.base, folder, random.Random(f"{self.seed} {case.kind} {case.name}"))
        size = sum(
            path.stat().st_size
            for path in folder.rglob("*")
            if path.is_file() and not path.is_symlink()
        )
        return folder, [part.replace("CANARY", str(self.root / "canary")) for part in argv], size

    def judge(self, case: Case, honest: Case) -> Verdict:
        """Run ``case``; ``honest`` is the undamaged one of its kind and command."""
        key = f"{honest.kind} {honest.main}"
        if key not in self.honest:
            folder, argv, _ = self.lay_out(honest)
            self.honest[key] = execute(MAINS[honest.main], argv, folder)
            if self.honest[key].code:
                raise SystemExit(f"the undamaged {key} failed: {self.honest[key].errors}")
        folder, argv, size = self.lay_out(case)
        before = tree(self.root, folder / "out")
        found = execute(MAINS[case.main], argv, folder, self.honest[key].seconds + SECONDS)
        faults = list(self.faults(case, found, self.honest[key], size))
        changed = {
            name
            for name, about in tree(self.root, folder / "out").items()
            if before.get(name) != about
        }
        if changed := sorted(name for name in changed if "/cache/" not in name):
            faults.append(f"wrote {changed[:3]}")
        if (self.root / "canary").exists():
            faults.append("ran code")
            (self.root / "canary").unlink()
        verdict = "; ".join(faults) or ("refused" if found.code == 2 else "harmless")
        detail = found.errors[-1].replace(str(self.root), "") if found.code and found.errors else ""
        if not faults:
            shutil.rmtree(folder)
        return Verdict(case.kind, case.name, verdict, detail, round(found.seconds, 2), found.grown)

    @staticmethod
    def faults(case: Case, found: Outcome, honest: Outcome, size: int) -> list[str]:
        """What is wrong with how a case ended."""
        faults = []
        if found.code is None or found.seconds > honest.seconds + SECONDS:
            return [f"took more than {SECONDS} s"]
        if found.code not in (0, 2):
            return [f"exit code {found.code}"]
        if found.code == 2 and (
            len(found.errors) != 1
            or not found.errors[0].startswith("error: ")
            or len(found.errors[0]) > 700
        ):
            faults.append(f"{len(found.errors)} lines on standard error")
        if found.code == 0 and case.expect == "refused":
            faults.append("was not refused")
        if found.code == 2 and case.expect == "harmless":
            faults.append("was refused")
        if found.grown > honest.grown + 2 * size + NOISE:
            faults.append(
                f"grew by {found.grown >> 20} MiB, {honest.grown >> 20} with undamaged files of {size >> 10} KiB"
            )
        return faults


def as_command(judge: Judge, case: Case, honest: float) -> list[str]:
    """The case as a true command: exit code, one line, time and address space; what is wrong with them."""
    folder, argv, _ = judge.lay_out(case)
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", f"bert_decomp.{case.main}", *argv],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=honest + SECONDS,
            check=False,
            env={**os.environ},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2),
        )
    except subprocess.TimeoutExpired:
        return ["took too long"]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    right = (
        done.returncode == 2 and len(lines) == 1
        if case.expect == "refused"
        else done.returncode in (0, 2)
    )
    shutil.rmtree(folder)
    return (
        []
        if right
        else [f"exit code {done.returncode} after {time.monotonic() - start:.0f} s: {lines[-3:]}"]
    )


def soak(root: Path, options: argparse.Namespace) -> tuple[dict[str, dict], list]:
    """All cases, and a sample of them as true commands; what goes into the result file, and the failures."""
    honest = {(case.kind, case.main): case for case in cases() if case.name == "undamaged"}
    chosen = cases()
    chosen = [case for case in chosen if case.kind in (options.kinds or case.kind)]
    chosen = [case for case in chosen if re.search(options.only, f"{case.kind} {case.name}")]
    judge = Judge(root, options.seed, runs=any(case.kind == "statistics" for case in chosen))
    verdicts, failures = [], []
    for case in (bar := tqdm(chosen, unit="case")):
        verdicts.append(judge.judge(case, honest[case.kind, case.main]))
        if verdicts[-1].verdict not in ("refused", "harmless"):
            failures.append(verdicts[-1])
            tqdm.write(
                f"{case.kind} {case.name}: {verdicts[-1].verdict}: {verdicts[-1].detail[:300]}"
            )
        bar.set_postfix(failures=len(failures))
        if options.show:
            tqdm.write(
                f"{case.kind:10} {case.name:40} {verdicts[-1].verdict:9} {verdicts[-1].detail[:220]}"
            )
    possible = [case for case in chosen if case.main != "table" and case.expect == "refused"]
    sample = random.Random(options.seed).sample(possible, min(options.processes, len(possible)))
    commands: dict[str, list] = defaultdict(list)
    usual = 0.0
    if sample:
        start = time.monotonic()
        as_command(judge, honest["model", "evaluate"], 600.0)
        usual = time.monotonic() - start
    for case in tqdm(sample, unit="command"):
        faults = as_command(judge, case, PATIENCE * usual)
        commands[case.kind].append({"case": case.name, "faults": faults})
        failures += [f"{case.kind} {case.name} as a command: {fault}" for fault in faults]
    print(f"{len(verdicts)} inputs, {len(sample)} as commands, {len(failures)} failures")
    kinds = {}
    for kind in dict.fromkeys(case.kind for case in chosen):
        mine = [verdict for verdict in verdicts if verdict.kind == kind]
        good = Counter(
            verdict.verdict if verdict.verdict in ("refused", "harmless") else "failed"
            for verdict in mine
        )
        kinds[kind] = {
            "seed": options.seed,
            "inputs": len(mine),
            "refused": good["refused"],
            "harmless": good["harmless"],
            "failed": good["failed"] + sum(bool(entry["faults"]) for entry in commands[kind]),
            "slowest_seconds": max(verdict.seconds for verdict in mine),
            "most_grown_mib": max(verdict.grown for verdict in mine) >> 20,
            "commands": commands[kind],
            "cases": [asdict(verdict) for verdict in mine],
        }
    return kinds, failures


def record(path: Path, options: argparse.Namespace, kinds: dict[str, dict]) -> None:
    """Write what was run, with the sums over all kinds."""
    save_record(
        path,
        "malformed",
        {
            "options": {"seed": options.seed, "processes": options.processes},
            "seconds": SECONDS,
            **{
                name: sum(kind[name] for kind in kinds.values())
                for name in ("inputs", "refused", "harmless", "failed")
            },
            "commands": sum(len(kind["commands"]) for kind in kinds.values()),
            "kinds": kinds,
            "environment": environment(),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness.malformed", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seed", type=int, default=8)
    parser.add_argument("--kinds", nargs="+", help="only these kinds; nothing is written then")
    parser.add_argument(
        "--only",
        default="",
        help="only cases whose kind and name match this pattern; nothing is written then",
    )
    parser.add_argument("--processes", type=int, default=24, help="cases repeated as true commands")
    parser.add_argument("--show", action="store_true", help="print every verdict")
    parser.add_argument("--output", type=Path, default=suite_file("robustness"))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    root = Path(tempfile.mkdtemp())
    kinds, failures = soak(root, options)
    if not options.only and not options.kinds:
        record(options.output, options, kinds)
    if failures:
        raise SystemExit(f"the failed cases are kept in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
