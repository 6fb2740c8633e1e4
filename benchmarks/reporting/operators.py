"""The table and the plot of each record of ``benchmarks.operators``.

The table has every point (milliseconds, TFLOP/s, GB/s, percent of the floor, speed over dense and over two matmuls),
the plot the speed over dense by number of rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bert_decomp.io.atomic import atomic_file

from ..records import read_suite
from .markdown import FIGURES


def floor_ms(point: dict[str, Any], ceilings: dict[str, float]) -> float:
    """The minimum time of a fused forward: the larger of its FLOPs and its bytes over what the device reaches."""
    return 1e3 * max(
        point["flops"] / ceilings["flops_per_s"], point["bytes"] / ceilings["bytes_per_s"]
    )


def title(point: dict[str, Any]) -> str:
    """A point's operator and widths."""
    hidden = f"x{point['hidden']}" if point["hidden"] else ""
    passes = ", forward + backward" if point["backward"] else ""
    return f"{point['operator']} {point['inner']}{hidden}x{point['outer']}{passes}"


def table(content: dict[str, Any]) -> str:
    """Every column of every point as a Markdown row."""
    lines = [
        f"**{content['device']}**, commit {content['commit']}, {content['date']}: torch "
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


def plot(content: dict[str, Any], path: Path) -> None:
    """Speed over dense by number of rows, a panel for each operator and shape, a line for each rank and column."""
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
    figure = Figure(figsize=(5 * across, 3.6 * down), layout="tight")
    axes = figure.subplots(down, across, squeeze=False)
    for axis, (name, lines) in zip(axes.flat, panels.items(), strict=False):
        for (column, rank), values in sorted(lines.items()):
            values.sort()
            axis.plot(
                *zip(*values, strict=True), marker="o", markersize=3, label=f"{column}, rank {rank}"
            )
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.set(title=name, xscale="log", xlabel="rows", ylabel="speed over dense")
        axis.legend(fontsize=6)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(f"{content['device']}, commit {content['commit'][:10]}")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def tables() -> str:
    """Every device's table, each with its plot."""
    return "\n\n".join(
        f"{table(record)}\n![speed over dense]({FIGURES}/operators-{record['name']}.png)"
        for record in read_suite("operators")
    )
