"""The run's report: one JSON with everything, and a Markdown and a self-contained HTML page made from that JSON alone.

``lowrank-bert report`` makes the two pages again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..errors import UserError
from ..io.atomic import write_text
from ..io.json import write_json
from ..kinds.pooling import MODULES
from . import plots
from .card import model_card
from .metrics import main_metric


@dataclass
class Section:
    """One part of the report: text, a table (first row is the head) and plots (caption, SVG)."""

    title: str
    text: str = ""
    table: list[list[str]] = field(default_factory=list)
    plots: list[tuple[str, str]] = field(default_factory=list)


def _quality(results: dict[str, Any]) -> Section:
    metrics, parameters = results["metrics"], results["parameters"]
    stages = list(metrics)
    names = list(metrics[stages[0]])
    dense = parameters["teacher"]
    table = [
        [
            "model",
            *[name.replace("_", " ") for name in names],
            "parameters",
            "encoder",
            "of dense encoder",
        ]
    ]
    for stage in stages:
        size = parameters.get(stage, parameters["student"])
        table.append(
            [
                stage,
                *[f"{100 * metrics[stage][name]:.1f}" for name in names],
                f"{size['whole']:,}",
                f"{size['encoder']:,}",
                f"{100 * size['encoder'] / dense['encoder']:.1f} %",
            ]
        )
    metric = main_metric(metrics[stages[0]])
    last = stages[-1]
    drop = 100 * (metrics["teacher"][metric] - metrics[last][metric])
    text = f"{metric.capitalize()} of the {last} model: {100 * metrics[last][metric]:.1f} %, " + (
        f"{abs(drop):.1f} points {'below' if drop > 0 else 'above'} its teacher."
        if round(abs(drop), 1)
        else "the same as its teacher's."
    )
    plot = plots.metric_by_stage({stage: metrics[stage][metric] for stage in stages}, metric)
    return Section(
        "Quality and size",
        text,
        table,
        [
            (f"{metric} by stage", plot),
            (
                "Distillation: what is left of each term",
                plots.terms_by_step(results["distillation_log"]),
            ),
        ],
    )


def _layers(plan: dict[str, Any]) -> Section:
    """What each layer keeps, of a plan of heads and neurons."""
    sizes = plan["sizes"]
    text = (
        f"Every layer had {sizes['heads']} heads of {sizes['head_size']} and {sizes['neurons']} neurons. "
        f"{100 * plan['encoder_fraction']:.1f} % of the encoder's weights are kept."
    ) + _embeddings(plan)
    table = [["layer", "heads", "scores", "values", "neurons", "two factors (rank)"]]
    for name, layer in plan["layers"].items():
        ranks = ", ".join(f"{part} {rank}" for part, rank in layer["ranks"].items())
        table.append(
            [
                name.rpartition(".")[2],
                str(len(layer["heads"])),
                str(layer["score_size"]),
                str(layer["value_size"]),
                str(layer["neurons"]),
                ranks,
            ]
        )
    return Section("Layers", text, table)


def _embeddings(plan: dict[str, Any]) -> str:
    """What a plan of either kind makes of the word embedding."""
    return "".join(
        f" The word embedding {name} ({entry['in_features']}x{entry['out_features']}) "
        + ("stays as it is." if entry["rank"] is None else f"is cut to rank {entry['rank']}.")
        for name, entry in plan.get("embeddings", {}).items()
    )


def _ranks(results: dict[str, Any]) -> Section:
    if "layers" in results["plan"]:
        return _layers(results["plan"])
    matrices = results["plan"]["matrices"]
    ranks = {name: entry["rank"] for name, entry in matrices.items()}
    full = {
        name: min(entry["in_features"], entry["out_features"]) for name, entry in matrices.items()
    }
    dense = [name for name, rank in ranks.items() if rank is None]
    text = f"{len(ranks) - len(dense)} of {len(ranks)} encoder matrices are factored."
    if dense:
        text += f" Left dense, because their rank would reach break-even: {', '.join(dense)}."
    text += _embeddings(results["plan"])
    return Section(
        "Ranks",
        text,
        plots=[
            (
                "Singular values of each matrix as the method weighs it",
                plots.spectra_and_ranks(results["spectra"], ranks),
            ),
            ("Rank kept of each matrix", plots.rank_by_layer(ranks, full)),
        ],
    )


def _speed(results: dict[str, Any]) -> Section:
    timings = results["timings"]
    rows = timings["rows"]
    table = [
        [
            "form",
            "batch",
            "ms a batch",
            "20 to 80 % quantile",
            "sentences/s",
            "speed-up",
            "activations, MB",
            "weights, MB",
        ]
    ]
    table += [
        [
            row["form"],
            str(row["batch_size"]),
            f"{row['latency_ms']:.2f}",
            f"{row['latency_ms_q20']:.2f} to {row['latency_ms_q80']:.2f}",
            f"{row['sentences_per_second']:.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['peak_activation_mb']:.1f}",
            f"{row['weights_mb']:.1f}",
        ]
        for row in rows
    ]
    fraction = results["plan"]["encoder_fraction"]
    threads = f"{timings['threads']} thread{'s' * (timings['threads'] > 1)}"
    text = (
        f"Measured in one process on {timings['device']}, {threads}, {timings['length']} tokens a sentence, "
        f"float32, the forms taking turns. {results['backend']} The floor is the dense model's time by the "
        f"multiplications that are left of its encoder matrices, {100 * fraction:.1f} %: {1 / fraction:.2f}x."
    )
    drawn = [
        (
            "Time a sentence, with speed-up over the dense model; dashed: the floor",
            plots.latency_by_batch(rows, fraction),
        )
    ]
    if timings.get("time_split"):
        largest = max(row["batch_size"] for row in rows)
        totals = {row["form"]: row["latency_ms"] for row in rows if row["batch_size"] == largest}
        drawn.append(
            (
                f"Where the time goes at batch {largest}, by the profiler; on a CPU rest includes the time between "
                "operators",
                plots.time_split(timings["time_split"], totals),
            )
        )
    pareto = results.get("pareto")
    if pareto:
        points = [
            *({**point, "series": "decomposed"} for point in pareto["points"]),
            *({**point, "series": point["label"]} for point in pareto["references"]),
        ]
        drawn.append(
            (
                f"{pareto['metric'].capitalize()} against time at batch {pareto['batch_size']}; decomposed models "
                "before any training, labelled by their share of the encoder",
                plots.pareto(points, pareto["metric"]),
            )
        )
    else:
        text += " Quality against time over several sizes was not measured: pareto_fractions 0.75,0.5,0.25 does."
    return Section("Speed and memory", text, table, drawn)


def _stages(results: dict[str, Any]) -> Section:
    peaks = results.get("stage_peak_memory_mb", {})
    table = [["stage", "seconds", "peak memory so far, MB"]] + [
        [name, f"{seconds:.1f}", f"{peaks[name]:.0f}" if name in peaks else "-"]
        for name, seconds in results["stage_seconds"].items()
    ]
    return Section(
        "Time and memory of each stage",
        "Wall-clock time when each stage really ran; a teacher from the cache takes next to none. The memory is the "
        "most that the process had had resident by the end of the stage.",
        table,
    )


SECTIONS = (_quality, _speed, _ranks, _stages)


def _markdown(title: str, lead: str, sections: list[Section], results: dict[str, Any]) -> str:
    lines = [f"# {title}", "", lead, ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.text:
            lines += [section.text, ""]
        if section.table:
            head, *body = section.table
            lines += ["| " + " | ".join(head) + " |", "|" + " --- |" + " ---: |" * (len(head) - 1)]
            lines += ["| " + " | ".join(row) + " |" for row in body] + [""]
    lines += [
        "## How it was made",
        "",
        "```json",
        json.dumps(
            {"options": results["options"], "environment": results["environment"]}, indent=2
        ),
        "```",
        "",
    ]
    return "\n".join(lines)


def report(results: dict[str, Any], folder: str | Path) -> Path:
    """Write ``results.json``, ``report.md`` and ``report.html`` into ``folder``; return the page's path.

    A folder ``model`` there gets a model card, unless it has one.

    Args:
        results: what ``bert_decomp.run`` gathers: ``task``, ``options``, ``environment``, ``parameters``, ``metrics``,
            ``sizes`` (the shares of the encoder of smaller sizes, by their names in ``metrics``), ``plan``,
            ``spectra``, ``timings``, ``backend``, ``distillation_log``, ``stage_seconds``.

    Raises:
        UserError: the folder cannot be written, or ``results`` lacks a part.
    """
    folder = Path(folder)
    try:
        options = results["options"]
        title = f"{Path(options['model_name_or_path']).name} on {results['task']['name']}: low-rank compression"
        lead = (
            f"Method {options['method']}, {results['task']['train']} training and {results['task']['validation']} "
            f"held-out examples, seed {options['seed']}."
        )
        sections = [make(results) for make in SECTIONS]
        library = (
            "sentence-transformers" if (folder / "model" / MODULES).exists() else "transformers"
        )
        card = model_card(results, library)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"these results lack a part of a complete run ({error}); run lowrank-bert compress"
        ) from error
    page = (
        Environment(loader=PackageLoader("bert_decomp.evaluation"), autoescape=True)
        .get_template("report.html.j2")
        .render(
            title=title,
            lead=lead,
            sections=sections,
            options=json.dumps(options, indent=2),
            environment=json.dumps(results["environment"], indent=2),
        )
    )
    write_json(folder / "results.json", results)
    write_text(folder / "report.md", _markdown(title, lead, sections, results))
    write_text(folder / "report.html", page)
    readme = folder / "model" / "README.md"
    if readme.parent.is_dir() and not readme.exists():
        write_text(readme, card)
    return folder / "report.html"
