"""Odd but honest files of examples, as people have them: ``python -m tests.robustness.odd_files``.

Each file goes through ``lowrank-bert evaluate`` and ``lowrank-bert compress`` with a tiny model. It is read, and the
schema says what was understood, or it is refused in one line that says what to do; what each file gives is recorded.
``tests/bert_decomp/data/test_odd_files.py`` holds the reader to the same expectations.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tqdm.auto import tqdm

from benchmarks.records import save_record, suite_file
from bert_decomp.cli import compress, evaluate
from bert_decomp.cli.command import command
from bert_decomp.io.environment import environment
from bert_decomp.models.saving import save
from tests.bert_decomp.tiny_models import tiny_model, tiny_tokenizer

from .damage import run_line
from .odd_file_cases import FILES, MODELS, OddFile


def call(main: Callable[[list[str]], None], argv: list[str]) -> tuple[int, list[str], list[str]]:
    """Exit code, and lines of standard output and of standard error."""
    out, errors = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(errors)
    logger = logging.getLogger("bert_decomp")
    logger.addHandler(handler)
    # The command sets up logging once for its process; here each call has a stream of its own.
    logger.propagate = False
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = command(main, argv)
    logger.removeHandler(handler)
    logger.propagate = True
    return code, out.getvalue().splitlines(), errors.getvalue().splitlines()


def try_file(file: OddFile, folder: Path, models: Path) -> dict[str, Any]:
    """What both commands make of a file, and what is wrong with that."""
    path = file.write(folder)
    commands = {
        "evaluate": (
            evaluate.main,
            [str(models / file.model), "--file", str(path), *file.options],
        ),
        "compress": (
            compress.main,
            [
                *run_line(
                    models,
                    folder / "run",
                    model_name_or_path=models / file.model,
                    train_file=path,
                    validation_file=path,
                    report_to="none",
                ),
                *file.options,
            ],
        ),
    }
    entry: dict[str, Any] = {"file": file.name, "model": file.model, "faults": []}
    for name, (main, argv) in commands.items():
        code, out, errors = call(main, argv)
        shown = [
            line.removeprefix("data: ") for line in [*out, *errors] if line.startswith("data: ")
        ]
        last = errors[-1].replace(str(folder), "").removeprefix("error: ") if code else ""
        entry[name] = {"exit_code": code, "data": [line.replace(str(folder), "") for line in shown]}
        if code:
            entry[name]["message"] = last
        if isinstance(file.expect, int):
            right = code == 0 and any(f"{file.expect} of {file.expect} rows" in s for s in shown)
        else:
            right = code == 2 and re.search(file.expect, last) is not None and not shown
        if not right:
            entry["faults"].append(name)
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.robustness.odd_files", description=__doc__.partition(":")[0]
    )
    parser.add_argument("--only", default="", help="files whose name has this; nothing is written")
    parser.add_argument("--out", type=Path, default=suite_file("robustness"))
    options = parser.parse_args()
    entries = []
    with tempfile.TemporaryDirectory() as root:
        for name, labels in MODELS.items():
            save(tiny_model("bert", **labels), tiny_tokenizer(), Path(root, name))
        for number, file in enumerate(tqdm(FILES, unit="file")):
            if options.only in file.name:
                folder = Path(root, f"case{number}")
                folder.mkdir()
                entries.append(try_file(file, folder, Path(root)))
    for entry in entries:
        result = entry["evaluate"]
        print(f"{entry['file']}: {result.get('message') or ' | '.join(result['data'])}")
    failures = [entry["file"] for entry in entries if entry["faults"]]
    print(f"{len(entries)} files, failures: {failures or 'none'}")
    if not options.only:
        read = sum(entry["evaluate"]["exit_code"] == 0 for entry in entries)
        save_record(
            options.out,
            "odd_files",
            {
                "command": "python -m tests.robustness.odd_files",
                "files": len(entries),
                "read": read,
                "refused": len(entries) - read,
                "failed": len(failures),
                "cases": entries,
                "environment": environment(),
            },
        )
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
