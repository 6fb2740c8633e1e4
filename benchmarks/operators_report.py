"""Tables and plots from the result files of ``benchmarks/operators.py``.

    python benchmarks/operators_report.py                      # every operators-*.json in benchmarks/results/
    python benchmarks/operators_report.py path/to/file.json

Beside each JSON it writes a Markdown file with every point (milliseconds, TFLOP/s, GB/s, percent of the floor, speed
over dense and over two matmuls) and a PNG with the speed over dense by number of rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bert_decomp.io.atomic import atomic_file, write_text  # noqa: E402
from bert_decomp.io.json import read_json  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def floor_ms(point: dict, ceilings: dict) -> float:
    """The least time of a fused forward: the larger of its FLOPs and its bytes over what the device reaches."""
    return 1e3 * max(
        point["flops"] / ceilings["flops_per_s"], point["bytes"] / ceilings["bytes_per_s"]
    )


def title(point: dict) -> str:
    """A point's operator and widths."""
    hidden = f"x{point['hidden']}" if point["hidden"] else ""
    passes = ", forward + backward" if point["backward"] else ""
    return f"{point['operator']} {point['inner']}{hidden}x{point['outer']}{passes}"


def table(content: dict) -> str:
    """Every column of every point as a Markdown row."""
    lines = [
        f"# Operators on {content['device']}",
        "",
        f"Made by `benchmarks/operators_report.py` from a run of commit {content['commit']} on {content['date']}: torch "
        f"{content['environment']['torch']}, triton {content['environment']['triton']}, {content['threads']} CPU "
        f"thread. Measured ceilings: {content['ceilings']['flops_per_s'] / 1e12:.2f} TFLOP/s (matmul), "
        f"{content['ceilings']['bytes_per_s'] / 1e9:.0f} GB/s (copy). The times are medians with the 0.2 and 0.8 "
        f"quantiles; TFLOP/s and GB/s count what the low-rank form needs. {content['left_out']} points were left out "
        "by the time limit.",
        "",
        "| operator | rows | rank | column | ms (q20, q80) | TFLOP/s | GB/s | % of floor | over dense "
        "| over two matmuls | peak MiB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for point in content["points"]:
        columns = point["columns"]
        least = floor_ms(point, content["ceilings"])
        for name, value in columns.items():
            start = f"| {title(point)} | {point['rows']} | {point['rank']} | {name} "
            if "error" in value:
                lines.append(f"{start}| failed: {value['error']} | | | | | | |")
                continue
            ms, low_rank = value["ms"], "dense" not in name
            speeds = [
                f"{columns[rival]['ms'] / ms:.2f}x" if "ms" in columns.get(rival, {}) else ""
                for rival in ("dense", "two_matmuls")
            ]
            rates = [
                f"{point['flops'] / ms / 1e9:.2f}",
                f"{point['bytes'] / ms / 1e6:.1f}",
                f"{100 * least / ms:.0f}",
            ]
            memory = "" if value["peak_bytes"] is None else f"{value['peak_bytes'] / 2**20:.1f}"
            lines.append(
                f"{start}| {ms:.4f} ({value['ms_q20']:.4f}, {value['ms_q80']:.4f}) | "
                f"{' | '.join(rates if low_rank and not point['backward'] else ['', '', ''])} | {' | '.join(speeds)} "
                f"| {memory} |"
            )
    return "\n".join(lines) + "\n"


def plot(content: dict, path: Path) -> None:
    """Speed over dense by number of rows, a panel for each operator and shape, a line for each rank and column."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, dict[tuple[str, int], list[tuple[int, float]]]] = {}
    for point in content["points"]:
        dense = point["columns"].get("dense", {})
        for name, value in point["columns"].items():
            if "ms" in value and "ms" in dense and "dense" not in name:
                lines = panels.setdefault(title(point), {})
                lines.setdefault((name, point["rank"]), []).append(
                    (point["rows"], dense["ms"] / value["ms"])
                )
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(5 * across, 3.6 * down), squeeze=False)
    for axis, (name, lines) in zip(axes.flat, panels.items()):
        for (column, rank), values in sorted(lines.items()):
            values.sort()
            axis.plot(*zip(*values), marker="o", markersize=3, label=f"{column}, rank {rank}")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=name, xscale="log", xlabel="rows", ylabel="speed over dense")
        axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{content['device']}, commit {content['commit'][:10]}")
    figure.tight_layout()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "files", nargs="*", type=Path, help="result files; all in benchmarks/results/ by default"
    )
    options = parser.parse_args(arguments)
    files = options.files or sorted(RESULTS.glob("operators-*.json"))
    if not files:
        print("no result file; python benchmarks/operators.py makes one", file=sys.stderr)
        return 2
    for path in files:
        content = read_json(path)
        write_text(path.with_suffix(".md"), table(content))
        plot(content, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.md')} and {path.with_suffix('.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
