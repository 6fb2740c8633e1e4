"""Write the generated tables and figures of the Markdown pages, or check that they agree with the result files.

    python -m benchmarks.reporting.tables [--check]

A table stands between ``<!-- table: name -->`` and ``<!-- end -->``, in any page of the repository's root or of
``docs/``. ``TABLES`` has the names.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from . import (
    engines,
    front,
    gpu,
    kinds,
    operators,
    plots,
    quality,
    robustness_table,
    serving,
    speed,
)
from .markdown import FIGURES

ROOT = Path(__file__).resolve().parents[2]
TABLES: dict[str, Callable[[], str]] = {
    "front": front.front,
    "main-job": quality.main_job,
    "base-size": quality.base_size,
    "methods": quality.methods,
    "ablation": quality.ablation,
    "presets": quality.presets,
    "method-errors": quality.method_errors,
    "units": quality.units,
    "distilled": quality.distilled,
    "embedders": kinds.embedders,
    "kinds": kinds.kinds,
    "nested": quality.nested,
    "embedding": quality.embedding,
    "embedding-loss": quality.embedding_loss,
    "encoder": speed.encoder,
    "encoder-all": speed.encoder_all,
    "latency": speed.latency,
    "engines": engines.engines,
    "int8-accuracy": engines.int8_accuracy,
    "int8-folder": engines.int8_folder,
    "export": speed.export,
    "decompose": speed.decompose,
    "collect": speed.collect,
    "pivoted": speed.pivoted,
    "units-time": speed.units_time,
    "units-cost": speed.units_cost,
    "distillation": speed.distillation,
    "predict": serving.predict,
    "million": serving.million,
    "serving": serving.serving,
    "operators": operators.tables,
    "gpu-checks": gpu.checks,
    "gpu-operators": gpu.operators,
    "gpu-norm": gpu.norm,
    "gpu-attention": gpu.attention,
    "gpu-units": gpu.units,
    "gpu-large": gpu.large,
    "gpu-graphs": gpu.graphs,
    "robustness": robustness_table.figures,
    "odd-files": robustness_table.odd_files,
    "faults": robustness_table.faults,
}
_MARKED = re.compile(r"<!-- table: ([\w-]+) -->\n(?:.*?\n)??<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    """Every Markdown page that may hold a table."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def render(text: str, folder: Path) -> str:
    """The text of a page in ``folder``, with every table generated from the result files.

    Raises:
        ValueError: the page asks for a table that does not exist.
    """
    figures = Path(os.path.relpath(ROOT / FIGURES, folder)).as_posix()

    def fill(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise ValueError(f"no table {match[1]!r}; there are {', '.join(sorted(TABLES))}")
        content = TABLES[match[1]]().replace(f"({FIGURES}/", f"({figures}/")
        return f"<!-- table: {match[1]} -->\n{content}\n<!-- end -->"

    return _MARKED.sub(fill, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reporting.tables", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a page is out of date"
    )
    check = parser.parse_args(arguments).check
    if not check:
        plots.draw(ROOT / FIGURES)
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = render(before, path.parent)
        if check and after != before:
            print(
                f"{path.relative_to(ROOT)} is out of date; run python -m benchmarks.reporting.tables",
                file=sys.stderr,
            )
            return 1
        if not check:
            path.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
