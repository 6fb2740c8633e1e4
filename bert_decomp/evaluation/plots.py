"""The report's plots, as SVG text that a page can hold without any other file."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "bert_decomp",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
)
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLOURS = ("#4c566a", "#2a7ab9", "#d1642b", "#3b8f5a", "#8a5fbf", "#b8912a")


def _svg(figure: Any) -> str:
    with io.StringIO() as text:
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
        whole = text.getvalue()
    # Without the block that names the program and its address: a page that stands alone names no other.
    return re.sub(r"<metadata>.*?</metadata>", "", whole[whole.index("<svg") :], flags=re.DOTALL)


def metric_by_stage(stages: dict[str, float], metric: str) -> str:
    """Bars: the metric (a share of 1, drawn in percent) of each model, in order."""
    figure, axes = plt.subplots(figsize=(4.6, 2.8))
    values = [100 * value for value in stages.values()]
    bars = axes.bar(list(stages), values, color=COLOURS[: len(values)], width=0.6)
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_ylabel(f"{metric}, %")
    if min(values) >= 0:
        axes.set_ylim(0, max(100.0, *values) * 1.08)
    return _svg(figure)


def terms_by_step(log: list[dict[str, Any]]) -> str:
    """Lines: each distillation term (unweighted, relative to the teacher feature's variance) against the step."""
    entries = [entry for entry in log if "loss" in entry]
    names = [name for name in entries[0] if name.startswith("loss_")] if entries else []
    figure, axes = plt.subplots(figsize=(6.0, 3.4))
    for index, name in enumerate(names):
        axes.semilogy(
            [entry["step"] for entry in entries],
            [float(entry[name]) for entry in entries],
            color=COLOURS[index % len(COLOURS)],
            linestyle="-" if index < len(COLOURS) else "--",
            linewidth=1.1,
            label=name.removeprefix("loss_").replace("_", " "),
        )
    axes.set_xlabel("step")
    axes.set_ylabel("term")
    if names:
        figure.legend(frameon=False, loc="outside right center", fontsize=7)
    return _svg(figure)


def latency_by_batch(rows: list[dict[str, Any]], floor: float | None = None) -> str:
    """Grouped bars: milliseconds a sentence of each form at each batch size, with the speed-up over the first form.

    A dashed line at the share ``floor`` of the first form's time is what the number of multiplications allows.
    """
    forms = list(dict.fromkeys(row["form"] for row in rows))
    sizes = list(dict.fromkeys(row["batch_size"] for row in rows))
    at = {(row["form"], row["batch_size"]): row for row in rows}
    figure, axes = plt.subplots(figsize=(4.8, 3.0))
    width = 0.8 / len(forms)
    for index, form in enumerate(forms):
        values = [at[form, size]["latency_ms"] / size for size in sizes]
        spread = [
            [
                (at[form, size]["latency_ms"] - at[form, size]["latency_ms_q20"]) / size
                for size in sizes
            ],
            [
                (at[form, size]["latency_ms_q80"] - at[form, size]["latency_ms"]) / size
                for size in sizes
            ],
        ]
        places = [place + (index - (len(forms) - 1) / 2) * width for place in range(len(sizes))]
        bars = axes.bar(
            places,
            values,
            width * 0.92,
            label=form,
            color=COLOURS[index % len(COLOURS)],
            yerr=spread,
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
        )
        axes.bar_label(
            bars,
            labels=[f"{at[form, size]['speedup']:.2f}x" for size in sizes],
            fontsize=8,
            padding=2,
        )
    if floor is not None:
        for place, size in enumerate(sizes):
            axes.hlines(
                floor * at[forms[0], size]["latency_ms"] / size,
                place - 0.45,
                place + 0.45,
                color="#222222",
                linestyle="--",
                linewidth=1,
                label="floor" if place == 0 else "_nolegend_",
            )
    axes.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    axes.set_ylabel("ms a sentence")
    axes.margins(y=0.14)
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return _svg(figure)


def time_split(splits: dict[str, dict[str, float]], totals: dict[str, float]) -> str:
    """Stacked bars: milliseconds of a batch by part of the layer (``splits``: shares) for each form (``totals``)."""
    figure, axes = plt.subplots(figsize=(4.8, 1.1 + 0.45 * len(splits)))
    left = dict.fromkeys(splits, 0.0)
    for index, part in enumerate(next(iter(splits.values()))):
        widths = {form: shares[part] * totals[form] for form, shares in splits.items()}
        bars = axes.barh(
            list(widths),
            list(widths.values()),
            left=list(left.values()),
            height=0.6,
            label=part,
            color=COLOURS[index % len(COLOURS)],
        )
        labels = [
            f"{100 * splits[form][part]:.0f} %"
            if widths[form] > 0.08 * max(totals.values())
            else ""
            for form in widths
        ]
        axes.bar_label(bars, labels=labels, label_type="center", fontsize=8, color="white")
        left = {form: left[form] + widths[form] for form in left}
    axes.invert_yaxis()
    axes.set_xlabel("ms a batch")
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return _svg(figure)


def pareto(points: list[dict[str, Any]], metric: str) -> str:
    """Dots: the metric, in percent, against milliseconds a batch; one dot a model, those of one series joined."""
    figure, axes = plt.subplots(figsize=(4.8, 3.0))
    for index, series in enumerate(dict.fromkeys(point["series"] for point in points)):
        chosen = sorted(
            (point for point in points if point["series"] == series),
            key=lambda point: point["latency_ms"],
        )
        x, y = (
            [point["latency_ms"] for point in chosen],
            [100 * point["metric"] for point in chosen],
        )
        axes.plot(
            x, y, "o-", color=COLOURS[index % len(COLOURS)], markersize=5, linewidth=1, label=series
        )
        for point, place in zip(chosen, zip(x, y, strict=True), strict=True):
            axes.annotate(
                point["label"], place, textcoords="offset points", xytext=(5, -10), fontsize=8
            )
    axes.set_xlabel("ms a batch")
    axes.set_ylabel(f"{metric}, %")
    axes.margins(x=0.12, y=0.14)
    axes.set_xlim(0, 1.18 * max(point["latency_ms"] for point in points))
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    return _svg(figure)


def spectra_and_ranks(spectra: dict[str, list[float]], ranks: dict[str, int | None]) -> str:
    """One line a matrix: singular values relative to the largest against their index; a dot marks the rank kept."""
    figure, axes = plt.subplots(figsize=(6.0, 3.4))
    kinds = list(dict.fromkeys(_kind(name) for name in spectra))
    labelled = set()
    for name, values in spectra.items():
        kind = _kind(name)
        colour = COLOURS[kinds.index(kind) % len(COLOURS)]
        positive = [value for value in values if value > 0]
        axes.semilogy(
            range(1, len(positive) + 1),
            positive,
            color=colour,
            linewidth=0.7,
            alpha=0.7,
            label=None if kind in labelled else kind,
        )
        labelled.add(kind)
        rank = ranks.get(name)
        if rank and rank <= len(positive):
            axes.plot(rank, positive[rank - 1], "o", color=colour, markersize=2.5)
    axes.set_xlabel("index of the singular value (dot: rank kept)")
    axes.set_ylabel("relative to the largest")
    axes.set_ylim(bottom=1e-4)
    figure.legend(frameon=False, loc="outside right center", fontsize=7)
    return _svg(figure)


def rank_by_layer(ranks: dict[str, int | None], full: dict[str, int]) -> str:
    """Dots: the rank kept of each matrix, by layer; a cross is a matrix left dense."""
    figure, axes = plt.subplots(figsize=(6.0, 3.0))
    kinds = list(dict.fromkeys(_kind(name) for name in ranks))
    for index, kind in enumerate(kinds):
        names = [name for name in ranks if _kind(name) == kind]
        jitter = (index - (len(kinds) - 1) / 2) * 0.1
        for dense in (False, True):
            chosen = [name for name in names if (ranks[name] is None) == dense]
            axes.plot(
                [_layer(name) + jitter for name in chosen],
                [ranks[name] or full[name] for name in chosen],
                "x" if dense else "o",
                color=COLOURS[index % len(COLOURS)],
                markersize=4,
                label=kind if chosen and (not dense or len(chosen) == len(names)) else None,
            )
    axes.set_xlabel("layer")
    axes.set_ylabel("rank")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.legend(frameon=False, loc="outside right center", fontsize=7)
    return _svg(figure)


def _layer(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _kind(name: str) -> str:
    """What a matrix is within its layer: its qualified name after the layer's number."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)
