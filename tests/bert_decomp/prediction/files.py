"""Texts, files of them and models, for tests of predictions."""

import json

import pyarrow.parquet as pq
from datasets import Dataset
from tiny_models import ANIMALS, COLOURS, tiny_model, tiny_tokenizer

from bert_decomp import DecompositionConfig, decompose_
from bert_decomp.models.saving import save

ROWS = 53


def texts(rows=ROWS):
    """Texts of many lengths, one without a word and one that is cut."""
    found = [
        " ".join(["the", COLOURS[i % 4], ANIMALS[i % 5], *["sees", "a", "dog"] * (i * 7 % 11)])
        for i in range(rows)
    ]
    found[3], found[5] = "...", "owl " * 60
    return found


def saved(folder, **changes):
    model = tiny_model("bert", **changes)
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    save(model, tiny_tokenizer(), folder)
    return str(folder)


def written(folder, table, kind="csv"):
    path = folder / f"in.{kind}"
    if kind == "csv":
        lines = ["id,n,text", *(f'{r["id"]},{r["n"]},"{r["text"]}"' for r in table.to_pylist())]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, table.to_pylist())), encoding="utf-8")
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=20)
    else:
        Dataset(table).save_to_disk(path)
    return str(path)
