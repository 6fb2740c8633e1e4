"""Odd but honest files of examples, as people have them, and what must come of each."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
from datasets import ClassLabel, Dataset, Features, Value

# Classes of the tiny models, and the labels that a config may declare.
CLASSES = ("plain", "coloured")
MODELS: dict[str, dict[str, Any]] = {
    "named": {"num_labels": 2, "id2label": dict(enumerate(CLASSES))},
    "unnamed": {"num_labels": 2},
    "score": {"num_labels": 1},
}
TEXTS = ("the red cat sees a dog", "the owl sees a hen", "a blue cow", "the dog is a dog")
LABELS = ("coloured", "plain", "coloured", "plain")


@dataclass(frozen=True)
class OddFile:
    """A file, and what must come of it.

    Attributes:
        content: the bytes, or a function that writes the file to a path.
        expect: how many examples are read, or what the refusal says (a regular expression).
        model: which of ``MODELS`` is asked.
        options: further options of the command line.
    """

    name: str
    suffix: str
    content: bytes | Callable[[Path], None]
    expect: int | str
    model: str = "named"
    options: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        """Write the file into a folder and return its path."""
        path = folder / f"text{self.suffix}"
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content)
        return path


def lines(*rows: str, end: str = "\n") -> str:
    return "".join(row + end for row in rows)


def joined(delimiter: str, labels: tuple[object, ...] = LABELS, head: str = "text label") -> str:
    rows = (f"{text}{delimiter}{label}" for text, label in zip(TEXTS, labels, strict=True))
    return lines(delimiter.join(head.split()), *rows)


def objects(*labels: object, **more: object) -> bytes:
    rows = zip(TEXTS, labels, strict=False)
    return lines(
        *(json.dumps({"text": text, "label": label, **more}) for text, label in rows)
    ).encode()


def frame(**columns: object) -> pd.DataFrame:
    return pd.DataFrame({"text": TEXTS, "label": LABELS, **columns})


def class_labels(path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["coloured", "plain"])})
    Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1]}, features=features).to_parquet(path)


CSV, TSV = joined(","), joined("\t")
QUOTE = TSV.replace("the owl", '"the owl')
FILES = (
    OddFile("plain CSV", ".csv", CSV.encode(), 4),
    OddFile("plain TSV", ".tsv", TSV.encode(), 4),
    # Quotes.
    OddFile("TSV with one quote at the start of a field", ".tsv", QUOTE.encode(), 4),
    OddFile("TSV, two such fields", ".tsv", QUOTE.replace("a blue", '"a blue').encode(), 4),
    OddFile(
        "TSV as a spreadsheet quotes it",
        ".tsv",
        TSV.replace("the owl sees a hen", '"the ""owl"""').encode(),
        "line 3",
    ),
    OddFile(
        "the same, named CSV",
        ".csv",
        TSV.replace("the owl sees a hen", '"the ""owl"""').encode(),
        4,
    ),
    OddFile(
        "CSV, text after a closing quote",
        ".csv",
        CSV.replace("the owl", '"the" owl').encode(),
        "line 3",
    ),
    OddFile(
        "CSV, a quote never closed", ".csv", CSV.replace("the owl", '"the owl').encode(), "line 3"
    ),
    OddFile(
        "CSV, a line's end in quotes",
        ".csv",
        CSV.replace("the owl sees a hen", '"the owl\nsees"').encode(),
        4,
    ),
    # Rows.
    OddFile(
        "CSV, a comma in the text",
        ".csv",
        CSV.replace("the owl", "the, owl").encode(),
        "line 3 has 3 fields",
    ),
    OddFile("CSV, a row cut short", ".csv", (CSV + "a dog\n").encode(), "line 6 has 1 field "),
    OddFile("CSV, trailing commas", ".csv", CSV.replace("\n", ",\n").encode(), 4),
    OddFile(
        "CSV, trailing commas but in the header",
        ".csv",
        CSV.replace("n\n", "n,\n").replace("d\n", "d,\n").encode(),
        4,
    ),
    OddFile("CSV, blank lines", ".csv", CSV.replace("\n", "\n\n").encode(), 4),
    OddFile("CSV, no label in a row", ".csv", (CSV + "a dog,\n").encode(), "line 6"),
    OddFile("CSV, no text in a row", ".csv", (CSV + ",plain\n").encode(), "line 6"),
    OddFile(
        "CSV without a header",
        ".csv",
        CSV.partition("\n")[2].encode(),
        "no column 'label'|looks like an example",
    ),
    OddFile("CSV, header alone", ".csv", b"text,label\n", "no examples"),
    OddFile("CSV, lines end in carriage returns", ".csv", CSV.replace("\n", "\r").encode(), 4),
    # Delimiters and encodings.
    OddFile("CSV of Excel, semicolons", ".csv", joined(";").encode(), 4),
    OddFile("CSV with tabs", ".csv", TSV.encode(), 4),
    OddFile("CSV, sep=; first", ".csv", ("sep=;\n" + joined(";")).encode(), 4),
    OddFile(
        "CSV that two delimiters fit",
        ".csv",
        b"text;a,label\nthe cat;1,plain\n",
        "commas or semicolons",
    ),
    OddFile("CSV in UTF-16", ".csv", CSV.encode("utf-16"), 4),
    OddFile("TSV in UTF-16", ".tsv", TSV.encode("utf-16"), 4),
    OddFile("JSON-lines in UTF-16", ".jsonl", objects(*LABELS).decode().encode("utf-16"), 4),
    OddFile("CSV with a byte order mark", ".csv", CSV.encode("utf-8-sig"), 4),
    OddFile(
        "CSV in Latin-1", ".csv", CSV.replace("cow", "c\xf4w").encode("latin-1"), "line 4.*UTF-8"
    ),
    # Columns.
    OddFile(
        "names of an id first",
        ".csv",
        lines("id,text,label", "x1,the cat,plain", "x2,a red cow,coloured").encode(),
        2,
    ),
    OddFile(
        "an unknown name beside an id",
        ".csv",
        lines("id,remark,label", "x1,the cat,plain", "x2,a red cow,coloured").encode(),
        2,
    ),
    OddFile(
        "title and body",
        ".csv",
        lines("title,body,label", "the cat,a dog,plain", "a cow,a red hen,coloured").encode(),
        "'title', 'body'",
    ),
    OddFile(
        "title and body, body named",
        ".csv",
        lines("title,body,label", "the cat,a dog,plain", "a cow,a red hen,coloured").encode(),
        2,
        options=("--text_column_names", "body"),
    ),
    OddFile(
        "premise and hypothesis",
        ".csv",
        lines(
            "label,premise,hypothesis", "plain,the cat,a cat", "coloured,a cow,a red cow"
        ).encode(),
        2,
    ),
    OddFile(
        "a pair, one second text missing",
        ".csv",
        lines("sentence1,sentence2,label", "the cat,,plain", "a cow,a red cow,coloured").encode(),
        2,
    ),
    OddFile("index column of pandas", ".csv", lambda path: frame().to_csv(path), 4),
    OddFile("text of numbers", ".csv", lines("text,label", "007,plain", "42,coloured").encode(), 2),
    OddFile(
        "two columns of one name",
        ".csv",
        b"text,text,label\na cat,a dog,plain\n",
        "two columns named 'text'",
    ),
    OddFile(
        "label under another name",
        ".csv",
        joined(",", head="text class").encode(),
        "no column 'label'.*label_column_name",
    ),
    OddFile(
        "that name given",
        ".csv",
        joined(",", head="text class").encode(),
        4,
        options=("--label_column_name", "class"),
    ),
    # Labels.
    OddFile("class indices", ".csv", joined(",", (1, 0, 1, 0)).encode(), 4),
    OddFile(
        "class indices of an unnamed model",
        ".csv",
        joined(",", (1, 0, 1, 0)).encode(),
        4,
        "unnamed",
    ),
    OddFile(
        "names for an unnamed model",
        ".csv",
        CSV.encode(),
        "lacks: coloured, plain.*classes have no names",
        "unnamed",
    ),
    OddFile("class indices as 0.0 and 1.0", ".csv", joined(",", (1.0, 0.0, 1.0, 0.0)).encode(), 4),
    OddFile("placeholder names", ".csv", joined(",", ("LABEL_1", "LABEL_0") * 2).encode(), 4),
    OddFile("names in capitals", ".csv", CSV.replace("coloured", "COLOURED").encode(), 4),
    OddFile(
        "a class that the model lacks",
        ".csv",
        joined(",", (*LABELS[:3], "grey")).encode(),
        "lacks: grey",
    ),
    OddFile("zeros and ones for a score", ".csv", joined(",", (1, 0, 1, 0)).encode(), 4, "score"),
    OddFile("fractions for a score", ".csv", joined(",", (0.5, 1.25, 3, 0)).encode(), 4, "score"),
    OddFile(
        "Excel's decimal commas",
        ".csv",
        joined(";", ("0,5", "1,25", "3", "0")).encode(),
        4,
        "score",
    ),
    OddFile("words for a score", ".csv", CSV.encode(), "no finite numbers", "score"),
    OddFile(
        "fractions for classes", ".csv", joined(",", (0.5, 1, 0, 1)).encode(), "lacks: 0, 1, 0.5"
    ),
    OddFile("lists of labels", ".jsonl", objects(["plain"], ["plain", "coloured"]), "multi-label"),
    OddFile(
        "lists of labels in CSV", ".csv", joined(",", ("['plain']",) * 4).encode(), "multi-label"
    ),
    OddFile("the word None as a text", ".csv", CSV.replace("a blue cow", "None").encode(), 4),
    OddFile("one class alone", ".csv", joined(",", ("plain",) * 4).encode(), 4),
    # JSON and Parquet.
    OddFile("JSON-lines", ".jsonl", objects(*LABELS), 4),
    OddFile(
        "JSON list",
        ".json",
        json.dumps([json.loads(row) for row in objects(*LABELS).splitlines()]).encode(),
        4,
    ),
    OddFile(
        "JSON of pandas by columns",
        ".json",
        lambda path: frame().to_json(path),
        "one flat object a line",
    ),
    OddFile("JSON-lines, a null label", ".jsonl", objects("plain", None), "line 2"),
    OddFile(
        "JSON-lines, a name twice",
        ".jsonl",
        b'{"text": "a", "text": "b", "label": "plain"}\n',
        "line 1",
    ),
    OddFile(
        "JSON-lines, a number among texts",
        ".jsonl",
        objects("plain") + b'{"text": 5, "label": "plain"}\n',
        "line 2",
    ),
    OddFile(
        "JSON-lines of tokens",
        ".jsonl",
        b'{"text": ["the", "cat"], "label": "plain"}\n',
        "text columns are needed",
    ),
    OddFile("Parquet of pandas", ".parquet", lambda path: frame().to_parquet(path), 4),
    OddFile(
        "Parquet with an index",
        ".parquet",
        lambda path: frame().set_index(pd.Index(list("wxyz"))).to_parquet(path),
        4,
    ),
    OddFile(
        "Parquet, a null text",
        ".parquet",
        lambda path: frame(text=["a cat", None, "b", "c"]).to_parquet(path),
        "row 2",
    ),
    OddFile("Parquet of datasets, named classes", ".parquet", class_labels, 4),
    OddFile("text file", ".txt", CSV.encode(), "cannot read files ending in '.txt'"),
    OddFile("Excel workbook", ".xlsx", b"PK\x03\x04", "cannot read files ending in '.xlsx'"),
)
