"""The model card of a run: a ``README.md`` beside the model, as the hub reads it, from the run's results alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .metrics import main_metric

TEXT = """# {title}

Made of {teacher} by lowrank-bert: method `{method}`, then distilled from it.

{table}

Metrics are of {validation:,} held-out examples of {task}, in percent. Times are medians: {processor}, {threads},
torch {torch}, transformers {transformers}.

```python
from bert_decomp import Predictor  # pip install 'lowrank-bert[bert]'

predictor = Predictor("path/to/this/folder")
```

After `import bert_decomp` transformers loads the folder like any other.
{sizes}"""
SIZES = """
The folder has smaller sizes, which an argument of `from_pretrained` loads:

| argument | {metric} | parameters | of the encoder |
| --- | ---: | ---: | ---: |
"""


def model_card(results: dict[str, Any], library: str = "transformers") -> str:
    """The card in Markdown, with what the hub reads at its head.

    Args:
        results: as ``report`` takes them.
        library: that loads the model.

    Raises:
        KeyError: a part is missing.
    """
    from huggingface_hub import EvalResult, ModelCardData

    task, metrics, options = results["task"], results["metrics"], results["options"]
    teacher, tag = options["model_name_or_path"], task.get("pipeline_tag")
    local = Path(teacher).exists()
    name = Path(teacher).name
    title = f"{name} at {_kept(results)} % of its encoder"
    last = list(metrics)[-1]
    found = [
        EvalResult(
            task_type=tag or "other",
            dataset_type=task["name"],
            dataset_name=task["name"],
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in metrics[last].items()
    ]
    head = ModelCardData(
        # A folder's name says nothing to the hub.
        base_model=None if local else teacher,
        library_name=library,
        pipeline_tag=tag,
        tags=["lowrank-bert", "compressed"],
        model_name=title,
        eval_results=found,
    )
    threads, environment = results["timings"]["threads"], results["environment"]
    body = TEXT.format(
        title=title,
        teacher=name,
        method=options["method"],
        table=_table(results, last),
        validation=task["validation"],
        task=task["name"],
        threads=f"{threads} thread{'s' if threads != 1 else ''}",
        processor=results["timings"]["device"],
        torch=environment["torch"],
        transformers=environment["transformers"],
        sizes=_sizes(results, main_metric(metrics[last])),
    )
    return f"---\n{head}\n---\n\n{body}"


def _kept(results: dict[str, Any]) -> str:
    dense, student = (results["parameters"][name]["encoder"] for name in ("teacher", "student"))
    return f"{100 * student / dense:.0f}"


def _sizes(results: dict[str, Any], metric: str) -> str:
    """What the smaller sizes of a nested model are; nothing of any other."""
    rows = []
    for stage, fraction in reversed(results.get("sizes", {}).items()):
        value, size = results["metrics"][stage][metric], results["parameters"][stage]
        rows.append(
            f"| `encoder_fraction={fraction}` | {100 * value:.1f} | {size['whole']:,} | {size['encoder']:,} |"
        )
    return "\n".join([SIZES.format(metric=metric).rstrip("\n"), *rows, ""]) if rows else ""


def _table(results: dict[str, Any], last: str) -> str:
    metrics, parameters = results["metrics"], results["parameters"]
    leading = main_metric(metrics[last])
    rows = [["", "before", "after"]]
    for metric in (leading, *(name for name in metrics[last] if name != leading)):
        rows.append(
            [metric, *(f"{100 * metrics[stage][metric]:.1f}" for stage in ("teacher", last))]
        )
    for what, name in (("parameters", "whole"), ("of the encoder", "encoder")):
        rows.append([what, *(f"{parameters[m][name]:,}" for m in ("teacher", "student"))])
    timings = results["timings"]
    for size in sorted({row["batch_size"] for row in timings["rows"]}):
        of_size = [row for row in timings["rows"] if row["batch_size"] == size]
        best = min(of_size[1:], key=lambda row: row["latency_ms"], default=of_size[0])
        rows.append(
            [
                f"ms, {size} x {timings['length']} tokens",
                f"{of_size[0]['latency_ms']:.2f}",
                f"{best['latency_ms']:.2f}",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- | ---: | ---: |", *lines[1:]])
