"""``lowrank-bert report``: the pages of a finished run, made again from its ``results.json``."""

from __future__ import annotations

from pathlib import Path

from ..extras import require
from .parser import Parser


def main(argv: list[str]) -> None:
    """The command: ``argv`` are its options."""
    parser = Parser(prog="lowrank-bert report", description=__doc__)
    parser.add_argument("results", type=Path, help="a run's results.json, or its folder")
    options = parser.parse_args(argv)
    require("report")

    from ..evaluation.report import report
    from ..io.json import read_json

    path = options.results / "results.json" if options.results.is_dir() else options.results
    print(report(read_json(path), path.parent))
