"""What tests of several stages share: the main job's options, a small trainer, files of data."""

import copy
import json
from dataclasses import replace
from functools import cache

import pandas as pd
import torch
from datasets import Dataset
from tiny_models import made_once, tiny_batch, tiny_model
from transformers import DataCollatorWithPadding, TrainingArguments, set_seed

from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.decomposition.structure import apply_blocks_
from bert_decomp.distillation.losses import PRESETS
from bert_decomp.distillation.resumable import fit
from bert_decomp.distillation.trainer import DistillationTrainer
from bert_decomp.models.saving import mark_low_rank
from bert_decomp.models.selection import select_linears
from bert_decomp.planning.blocks import BlockPlan, LayerPlan
from bert_decomp.statistics import collect_statistics
from bert_decomp.units import layers_of

GLUE_ROWS = {
    "cola": (("sentence",), (0, 1)),
    "sst2": (("sentence",), (0, 1)),
    "mrpc": (("sentence1", "sentence2"), (0, 1)),
    "stsb": (("sentence1", "sentence2"), (0.5, 4.75)),
    "qqp": (("question1", "question2"), (0, 1)),
    "mnli": (("premise", "hypothesis"), (0, 1, 2)),
    "qnli": (("question", "sentence"), (0, 1)),
    "rte": (("sentence1", "sentence2"), (0, 1)),
    "wnli": (("sentence1", "sentence2"), (0, 1)),
}


@cache
def layers_of_tiny(family):
    """The layers of ``tiny_model(family)`` with what units must know of them; all share them, none changes them."""
    model = tiny_model(family)
    statistics = collect_statistics(
        model, [tiny_batch(20, 13)], select_linears(model), needs=("gradients",), progress=False
    )
    return layers_of(model, statistics)


@made_once
def resized(family):
    """A layer of fewer, smaller heads; one without heads and neurons; one of factors with fewer neurons."""
    model, layers = tiny_model(family), layers_of_tiny(family)
    whole = LayerPlan.dense(layers[0].sizes)
    third = replace(whole, neurons=20)
    if layers[0].sizes.rotary:  # whole heads alone, never all of them, and no factors on top
        first, second = replace(whole, heads=(0, 2)), replace(whole, neurons=0)
    else:
        first = replace(whole, heads=(1, 3), score_size=4, value_size=5)
        second = replace(whole, heads=(), neurons=0)
        third = replace(third, ranks={"ffn_intermediate": 6, "ffn_output": 5})
    names = [layer.name for layer in layers]
    plan = BlockPlan(layers[0].sizes, dict(zip(names, (first, second, third), strict=True)))
    apply_blocks_(model, layers, plan)
    mark_low_rank(model)
    return model.eval()


def student_of(teacher, rank=7):
    student = copy.deepcopy(teacher)
    decompose_(student, DecompositionConfig("svd", rank=rank), progress=False)
    return student


def arguments(tmp_path, encoder, out="run", **changes):
    options = {
        "model_name_or_path": encoder,
        "train_file": tmp_path / "train.csv",
        "validation_file": tmp_path / "dev.csv",
        "output_dir": tmp_path / out,
        "cache_dir": tmp_path / "cache",
        "teacher_num_train_epochs": 3,
        "teacher_learning_rate": 3e-3,
        "learning_rate": 3e-3,
        "num_train_epochs": 2,
        "save_steps": 3,
        "measure_batch_sizes": "1,2",
        "measure_seconds": 0.01,
        "measure_seq_length": 7,
        "disable_tqdm": True,
        "per_device_train_batch_size": 16,
        "use_cpu": True,
        **changes,
    }
    return [
        part
        for name, value in options.items()
        if value is not None
        for part in (f"--{name}", str(value))
    ]


def training_set(rows=48):
    batch = tiny_batch(rows)
    lengths = batch["attention_mask"].sum(1)
    return Dataset.from_list(
        [
            {
                "input_ids": ids[:length].tolist(),
                "attention_mask": [1] * int(length),
                "labels": int(label),
            }
            for ids, length, label in zip(batch["input_ids"], lengths, batch["labels"], strict=True)
        ]
    )


def trainer_for(
    folder,
    tokenizer,
    callbacks=(),
    terms=PRESETS["paper"],
    student=None,
    teacher=None,
    data=None,
    extra=None,
    collator=None,
    **options,
):
    teacher = teacher or tiny_model("bert")
    arguments = TrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": 4,
            "num_train_epochs": 2,
            "save_steps": 5,
            "learning_rate": 1e-3,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "logging_steps": 4,
            "train_sampling_strategy": "group_by_length",
            **options,
        }
    )
    set_seed(arguments.seed)
    return DistillationTrainer(
        student or student_of(teacher),
        arguments,
        train_dataset=data or training_set(),
        processing_class=tokenizer,
        data_collator=collator or DataCollatorWithPadding(tokenizer),
        teacher=teacher,
        distillation=terms,
        callbacks=list(callbacks),
        **(extra or {}),
    )


def write(path, rows, names=("sentence", "label")):
    frame = pd.DataFrame(rows, columns=list(names))
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        frame.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".parquet":
        frame.to_parquet(path, index=False)
    else:
        path.write_text("\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    return str(path)


def write_glue(root, name, suffix=".parquet"):
    """The files of one task, with the names and columns of nyu-mll/glue; the held-out splits differ in size."""
    columns, labels = GLUE_ROWS[name]
    (root / name).mkdir(parents=True)
    held_out = (
        ("validation_matched", "validation_mismatched") if name == "mnli" else ("validation",)
    )
    for size, split in ((9, "train"), *zip((4, 5), held_out, strict=False)):
        rows = [
            (*(f"{column} {split} {i}" for column in columns), labels[i % len(labels)], i)
            for i in range(size)
        ]
        write(root / name / f"{split}-00000-of-00001{suffix}", rows, (*columns, "label", "idx"))
    (root / name / "test-00000-of-00001.parquet").write_text("never read")


def assert_resumed_is_uninterrupted(folder, tokenizer, steps=7, **options):
    """A training stopped after 5 steps and resumed ends with the weights of one that was not; the last trainer."""
    states = []
    for name, ends in (("whole", (steps,)), ("parts", (5, steps))):
        for end in ends:
            trainer = trainer_for(
                folder / name, tokenizer, max_steps=end, lr_scheduler_type="constant", **options
            )
            fit(trainer)
            trainer.close()
        states.append(trainer.model.state_dict())
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    return trainer
