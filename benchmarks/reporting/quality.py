"""Tables of what compression does to a model's answers."""

from __future__ import annotations

import statistics
from typing import Any

from ..quality import table as suite_table
from ..records import grouped, read_record, read_suite
from .markdown import machine, seeds, table, trained


def main_job() -> str:
    """Quality, size and speed of the default run."""
    results = read_record("main-job", "questions")
    metrics, parameters = results["metrics"], results["parameters"]
    batch = max(row["batch_size"] for row in results["timings"]["rows"])
    speed = {row["form"]: row for row in results["timings"]["rows"] if row["batch_size"] == batch}
    forms = {"teacher": "dense", "distilled": "low-rank, fused"}
    rows = []
    for stage, values in metrics.items():
        size = parameters["teacher" if stage == "teacher" else "student"]
        row = speed.get(forms.get(stage, ""))
        rows.append(
            [
                stage,
                f"{100 * values['accuracy']:.1f} %",
                f"{100 * values['f1']:.1f}",
                f"{size['whole'] / 1e6:.1f} M",
                f"{size['encoder'] / 1e6:.1f} M",
                f"{row['sentences_per_second']:.0f} ({row['speedup']:.2f}x)" if row else "",
            ]
        )
    total = sum(results["stage_seconds"].values())
    return (
        table(
            [
                "model",
                "accuracy",
                "macro F1",
                "parameters",
                "encoder alone",
                f"sentences/s, batch {batch}",
            ],
            rows,
        )
        + f"\n\nMethod `{results['options']['method']}`, allocation `{results['options']['allocation']}`, seed "
        f"{results['options']['seed']}, {results['task']['validation']} held-out questions; "
        f"{total / 60:.1f} minutes in all, teacher included; sentences of {results['timings']['length']} tokens, "
        f"{results['timings']['threads']} thread. {machine(results['environment'])}."
    )


def base_size() -> str:
    """Quality of the whole job on the base-size encoder, by size."""
    rows, made_with = [], ""
    for result in sorted(
        read_suite("base-size"), key=lambda result: -result["plan"]["encoder_fraction"]
    ):
        options, seconds, made_with = (
            result["options"],
            result["stage_seconds"],
            machine(result["environment"]),
        )
        accuracy = [
            f"{100 * result['metrics'][stage]['accuracy']:.1f} %"
            for stage in ("teacher", "decomposed", "distilled")
        ]
        rows.append(
            [
                f"{options['model_name_or_path']}, {result['task']['name']}, seed {options['seed']}",
                f"rank {options['rank']}"
                if options["rank"]
                else f"{100 * result['plan']['encoder_fraction']:.0f} %",
                f"{result['parameters']['student']['encoder'] / 1e6:.1f} M",
                *accuracy,
                options["distillation_preset"],
                f"{options['num_train_epochs']:g}",
                f"{options['learning_rate']:g}",
                *(
                    f"{seconds[stage] / 60:.1f}" if stage in seconds else ""
                    for stage in ("teacher", "distil")
                ),
            ]
        )
    return (
        table(
            [
                "encoder and task",
                "size",
                "encoder weights",
                "teacher",
                "decomposed",
                "distilled",
                "preset",
                "epochs",
                "learning rate",
                "minutes, teacher",
                "minutes, distillation",
            ],
            rows,
        )
        + f"\n\nOne thread. {made_with}."
    )


def methods() -> str:
    """The comparison of methods."""
    return suite_table.table(*suite_table.read()).strip()


def ablation() -> str:
    """The ablation of distillation terms."""
    return suite_table.table(*suite_table.read("ablation")).strip()


def presets() -> str:
    """The presets of the distillation on several seeds."""
    return suite_table.table(*suite_table.read("presets")).strip()


def method_errors() -> str:
    """What each method makes small."""
    parts = []
    for result in reversed(read_suite("method-errors")):
        least = min(row["loss"] for row in result["rows"])
        rows = [
            [
                f"{row['method']}, {row['allocation']}",
                f"{row['smallest_rank']} to {row['largest_rank']}",
                f"{100 * row['weight']:.0f} %",
                f"{100 * row['output']:.1f} %",
                f"{row['loss'] / least:.1f}",
                f"{1000 * row['divergence']:.0f}",
                f"{100 * row['metrics']['accuracy']:.1f} %",
            ]
            for row in sorted(result["rows"], key=lambda row: -row["loss"])
        ]
        parts.append(
            f"**{result['task']}**, {100 * result['options']['size']:g} % of the encoder, seed "
            f"{result['options']['seed']}, teacher {100 * result['teacher']['accuracy']:.1f} %\n\n"
            + table(
                [
                    "method, ranks",
                    "from to",
                    "weight error",
                    "output error",
                    "loss error",
                    "KL",
                    "accuracy",
                ],
                rows,
            )
            + f"\n\n{machine(result['environment'])}."
        )
    return "\n\n".join(parts)


def units() -> str:
    """What is decomposed together, mean over seeds."""
    return _units_of("units")


def distilled() -> str:
    """The same after longer training, in float32 and in the int8 runtime."""
    return _units_of("distilled")


def _units_of(suite: str) -> str:
    found, machines = read_suite(suite), {}
    for environment in (record["environment"] for record in found):
        machines[environment["cpu"], environment["cpu_capability"]] = machine(environment)
    cells = grouped(found, "task", "stage", "size", "experiment")
    rows = []
    for (task, stage, size, experiment), records in sorted(
        cells.items(), key=lambda item: (item[0][0] != "questions", item[0][1], -item[0][2])
    ):
        count = len(records)
        rows.append(
            [
                task,
                f"{100 * size:g} %",
                trained(stage),
                experiment.replace("-", " "),
                seeds(records),
                f"{100 * sum(record['metrics']['accuracy'] for record in records) / count:.1f} %",
                f"{100 * sum(record['teacher']['accuracy'] for record in records) / count:.1f} %",
                f"{1000 * sum(record['divergence'] for record in records) / count:.1f}",
            ]
        )
        if all("int8" in record for record in records):
            in_int8 = [record["int8"] for record in records]
            rows[-1] += [
                f"{100 * sum(one['metrics']['accuracy'] for one in in_int8) / count:.1f} %",
                f"{1000 * sum(one['divergence'] for one in in_int8) / count:.1f}",
            ]
    head = ["task", "encoder", "trained", "units", "seeds", "accuracy", "teacher", "KL"]
    head += ["in int8", "KL"][: max(map(len, rows)) - len(head)]
    return table(head, rows) + f"\n\n{'; '.join(machines.values())}."


def _mean(records: list[dict[str, Any]], value: Any) -> float:
    return statistics.mean(value(record) for record in records)


def embedding() -> str:
    """The word embedding in a budget of the whole model, mean over seeds: what is left of it, and of the encoder."""
    cells = grouped(read_suite("embedding"), "task", "size", "stage", "experiment")
    rows, about = [], None
    for (task, size, stage, experiment), records in sorted(
        cells.items(), key=lambda item: (item[0][0] != "questions", item[0][2], -item[0][1])
    ):
        units, _, rest = experiment.partition("-")
        found = [rank for record in records for rank in record.get("embeddings", {}).values()]
        ranks = sorted({rank for rank in found if rank is not None})
        kept = [*map(str, ranks), *(["dense"] if None in found or not found else [])]
        rows.append(
            [
                task,
                f"{100 * size:g} %",
                trained(stage),
                units,
                {"": "by the auction", "encoder-alone": "left out"}.get(rest, "given"),
                kept[0] if len(kept) == 1 else f"{kept[0]} to {kept[-1]}",
                f"{100 * _mean(records, lambda one: one['encoder_fraction']):.0f} %",
                seeds(records),
                f"{100 * _mean(records, lambda one: one['metrics']['accuracy']):.1f} %",
                f"{100 * _mean(records, lambda one: one['teacher']['accuracy']):.1f} %",
                f"{1000 * _mean(records, lambda one: one['divergence']):.1f}",
            ]
        )
        about = records[0]["environment"]
    head = ["task", "model", "trained", "units", "embedding", "its rank", "encoder", "seeds"]
    head += ["accuracy", "teacher", "KL"]
    return table(head, rows) + f"\n\n{machine(about or {})}."


def embedding_loss() -> str:
    """Foreseen and measured losses of the word embedding and of the encoder, each cut alone."""
    parts = []
    for result in reversed(read_suite("embedding-loss")):
        rows = [
            [
                row["part"],
                f"{100 * row['size']:g} %" if row["part"] == "encoder" else f"rank {row['size']:g}",
                f"{1e6 * row['expected_loss']:.0f}",
                f"{1000 * row['divergence']:.1f}",
                f"{1e-3 * row['divergence'] / row['expected_loss']:.2f}",
                f"{100 * row['metrics']['accuracy']:.1f} %",
            ]
            for row in sorted(result["rows"], key=lambda row: -row["divergence"])
        ]
        parts.append(
            f"**{result['task']}**, seed {result['options']['seed']}, teacher "
            f"{100 * result['teacher']['accuracy']:.1f} %\n\n"
            + table(["cut", "to", "foreseen, 1e-6", "KL", "KL over foreseen", "accuracy"], rows)
            + f"\n\nOf the held-out tokens {100 * result['unseen']['held_out']:.1f} % do not stand in the calibration "
            f"text; {100 * result['unseen']['expected']:.1f} % were expected. {machine(result['environment'])}."
        )
    return "\n\n".join(parts)


def nested() -> str:
    """One model of several sizes beside a model of each size alone, mean over the seeds that both have."""
    found: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for record in read_suite("nested"):
        found.setdefault((record["experiment"], record["size"]), {})[record["seed"]] = record
    rows, about = [], None
    for units, several in (("matrices", "nested"), ("structured", "nested-structured")):
        for size in sorted({size for name, size in found if name == several}, reverse=True):
            alone, shared = found.get((units, size), {}), found[several, size]
            if seeds := sorted(set(alone) & set(shared)):
                accuracy, divergence = (
                    [
                        statistics.mean(value(records[seed]) for seed in seeds)
                        for records in (alone, shared)
                    ]
                    for value in (
                        lambda record: 100 * record["metrics"]["accuracy"],
                        lambda record: 1000 * record["divergence"],
                    )
                )
                rows.append(
                    [
                        units,
                        f"{100 * size:g} %",
                        ", ".join(map(str, seeds)),
                        *(f"{value:.1f} %" for value in accuracy),
                        f"{accuracy[1] - accuracy[0]:+.1f}",
                        *(f"{value:.1f}" for value in divergence),
                    ]
                )
                about = shared[seeds[-1]]["environment"]
    head = ["units", "encoder", "seeds", "alone", "nested", "points", "KL alone", "KL nested"]
    return table(head, rows) + f"\n\nQuestions, preset `best`. {machine(about)}."
