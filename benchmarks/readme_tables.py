"""Write the README's tables from the committed result files, or check that they agree.

    python -m benchmarks.readme_tables [--check]

A table stands in the README between ``<!-- table: name -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .methods import table as methods_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _machine(environment: dict[str, Any]) -> str:
    return (f"{environment['cpu']} ({environment['cpu_capability']}), {environment['cores']} cores, torch "
            f"{environment['torch']}, transformers {environment['transformers']}, commit {environment['commit']}")


def main_job() -> str:
    """Quality, size and speed of the default run."""
    results = _read("main-job-questions.json")
    metrics, parameters = results["metrics"], results["parameters"]
    batch = max(row["batch_size"] for row in results["timings"]["rows"])
    speed = {row["form"]: row for row in results["timings"]["rows"] if row["batch_size"] == batch}
    forms = {"teacher": "dense", "distilled": "low-rank, fused"}
    rows = []
    for stage, values in metrics.items():
        size = parameters["teacher" if stage == "teacher" else "student"]
        row = speed.get(forms.get(stage, ""))
        rows.append([stage, f"{100 * values['accuracy']:.1f} %", f"{100 * values['f1']:.1f}",
                     f"{size['whole'] / 1e6:.1f} M", f"{size['encoder'] / 1e6:.1f} M",
                     f"{row['sentences_per_second']:.0f} ({row['speedup']:.2f}x)" if row else ""])
    total = sum(results["stage_seconds"].values())
    return (_table(["model", "accuracy", "macro F1", "parameters", "encoder alone", f"sentences/s, batch {batch}"], rows)
            + f"\n\nMethod `{results['options']['method']}`, allocation `{results['options']['allocation']}`, seed "
            f"{results['options']['seed']}, {results['task']['validation']} held-out questions; "
            f"{total / 60:.1f} minutes in all, teacher included; sentences of {results['timings']['length']} tokens, "
            f"{results['timings']['threads']} thread. {_machine(results['environment'])}.")


def encoder() -> str:
    """End-to-end time of base-size encoders."""
    rows, machine = [], ""
    for path in sorted(RESULTS.glob("encoder-*.json")):
        result = _read(path.name)
        machine = _machine(result["environment"])
        name = path.stem.removeprefix("encoder-")
        rows += [[name.rsplit("-", 2)[0], row["form"], f"{row['batch_size']} x {result['length']}",
                  f"{row['latency_ms']:.0f}", f"{row['speedup']:.2f}x"] for row in result["rows"]]
    return _table(["model", "form", "batch x tokens", "ms", "against dense"], rows) + f"\n\n{machine}."


def decompose() -> str:
    """Time and memory of factoring the base-size encoder."""
    rows, machine = [], ""
    for path in sorted(RESULTS.glob("decompose-*.json")):
        result = _read(path.name)
        machine = _machine(result["environment"])
        model, method = path.stem.removeprefix("decompose-").rsplit("-", 1)
        rows.append([model, method, str(result["matrices"]), f"{result['decompose_seconds']:.1f}",
                     f"{result['peak_memory_gb']:.2f}"])
    return _table(["model", "method", "matrices", "seconds", "peak memory, GB"], rows) + f"\n\n{machine}."


def methods() -> str:
    """The comparison of methods."""
    return methods_table.table(*methods_table.read()).strip()


TABLES: dict[str, Callable[[], str]] = {"main-job": main_job, "encoder": encoder, "decompose": decompose,
                                        "methods": methods}


def render(text: str) -> str:
    """``text`` with every table made anew."""
    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->\n(?:.*?\n)??<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the README differs")
    check = parser.parse_args().check
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = render(before)
    if check and after != before:
        print("README.md and benchmarks/results disagree; run python -m benchmarks.readme_tables", file=sys.stderr)
        return 1
    if not check:
        path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
