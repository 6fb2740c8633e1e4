"""Malformed data files, judged with a model of two classes."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from .damage import HARMED, HARMLESS, Case, Damage, flip, link


def data(name: str, content: Any, suffix: str = "csv", expect: str = "refused", *more: str) -> Case:
    """A data file: these bytes, or what a function of the file's path writes; judged with a model of two classes."""

    def lay(base: Path, folder: Path, draw: random.Random) -> list[str]:
        path = folder / f"text.{suffix}"
        if callable(content):
            content(base, path, draw)
        else:
            path.write_bytes(content)
        return [str(base / "model"), "--file", str(path), *more]

    return Case("data", name, "evaluate", expect, lay)


def written(suffix: str) -> Callable[[Path, Path, random.Random], None]:
    """The valid examples in another format."""

    def write(base: Path, path: Path, draw: random.Random) -> None:
        found = [
            line.rsplit(",", 1) for line in (base / "dev.csv").read_text().splitlines()[1:]
        ] * 3
        rows = {"sentence": [row[0] for row in found], "label": [row[1] for row in found]}
        if suffix == "parquet":
            Dataset.from_dict(rows).to_parquet(path)
        elif suffix == "jsonl":
            path.write_text(
                "".join(
                    json.dumps(dict(zip(rows, row, strict=True))) + "\n"
                    for row in zip(*rows.values(), strict=True)
                )
            )
        else:
            sign = {"csv": ",", "tsv": "\t"}[suffix]
            path.write_text(
                "".join(
                    f"{sign.join(row)}\n"
                    for row in (tuple(rows), *zip(*rows.values(), strict=True))
                )
            )

    return write


def hurt(suffix: str, damage: Damage) -> Callable[[Path, Path, random.Random], None]:
    def write(base: Path, path: Path, draw: random.Random) -> None:
        written(suffix)(base, path, draw)
        damage(path, draw)

    return write


def packed(base: Path, path: Path, draw: random.Random) -> None:
    """Thirty megabytes of text in thirty kilobytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../evil.csv", b"sentence,label\n" + b"the cat,plain\n" * 2_000_000)


def repeated(base: Path, path: Path, draw: random.Random) -> None:
    """Three million rows in some kilobytes of Parquet."""
    import pyarrow
    import pyarrow.parquet

    row = pyarrow.array(["the cat"]).dictionary_encode().take(pyarrow.array([0] * 3_000_000))
    pyarrow.parquet.write_table(
        pyarrow.table({"sentence": row, "label": row}), path, compression="zstd"
    )


def data_cases() -> list[Case]:
    head = b"sentence,label\n"
    out = [data("undamaged", written("csv"), "csv", "harmless")]
    out += [
        data(f"undamaged-{suffix}", written(suffix), suffix, "harmless")
        for suffix in ("tsv", "jsonl", "parquet")
    ]
    for suffix in ("csv", "jsonl", "parquet"):
        either = ("cut-0.3", "cut-0.6", "cut-0.97") if suffix == "csv" else ()
        out += [
            data(
                f"{suffix}-{name}",
                hurt(suffix, damage),
                suffix,
                "either" if name in either else "refused",
            )
            for name, damage in HARMED.items()
            if name != "link-to-itself"
        ]
        out += [
            data(f"{suffix}-flip-{number}", hurt(suffix, flip()), suffix, "either")
            for number in range(8)
        ]
        out += [data(f"{suffix}-a-link-out", hurt(suffix, link()), suffix, "harmless")]
    out += [
        data(f"jsonl-{name}", damage_bytes, "jsonl")
        for name, damage_bytes in {
            "deep-lists": b'{"sentence": '
            + b"[" * 100_000
            + b"]" * 100_000
            + b', "label": "plain"}\n',
            "deep-objects": b'{"sentence": '
            + b'{"a":' * 100_000
            + b"1"
            + b"}" * 100_000
            + b', "label": "plain"}\n',
            "names-100000": b"{" + b",".join(b'"c%d": "x"' % i for i in range(100_000)) + b"}\n",
            "deep-over-lines": b"[\n" * 100_000,
            "deep-open": b'{"sentence": ' + b"[" * 3_000_000,
            "a-number": b"7\n",
            "nul": b'{"a": "\0"}\n',
            "lists": b'{"sentence": ["a"], "label": "plain"}\n',
            "label-objects": b'{"sentence": "a", "label": {"x": 1}}\n',
            "mixed": b'{"sentence": "a", "label": "plain"}\n{"sentence": 5, "label": "plain"}\n',
            "nulls": b'{"sentence": null, "label": "plain"}\n',
            "surrogate": b'{"sentence": "\\ud800", "label": "plain"}\n',
            "number-10^400": b'{"sentence": "a", "label": 1' + b"0" * 400 + b"}\n",
        }.items()
    ]
    out += [
        data(
            "jsonl-byte-order-mark", hurt("jsonl", HARMLESS["byte-order-mark"]), "jsonl", "either"
        ),
        data(
            "jsonl-key-twice",
            b'{"sentence": "a", "sentence": "b", "label": "plain"}\n',
            "jsonl",
            "either",
        ),
        data("csv-byte-order-mark", hurt("csv", HARMLESS["byte-order-mark"]), "csv", "harmless"),
        data("csv-crlf", hurt("csv", HARMLESS["crlf"]), "csv", "harmless"),
        data(
            "csv-utf-16",
            (head + b"the cat,plain\n").decode().encode("utf-16"),
            "csv",
            "harmless",
        ),
    ]
    out += [
        data(f"csv-{name}", content)
        for name, content in {
            "head-alone": head,
            "nul": head + b"the \0 cat,plain\n",
            "quote-open": head + b'"the cat,plain\n' * 3,
            "columns-few": head + b"the cat\n",
            "columns-many": head + b"a,b,c,d\n",
            "columns-100000": b",".join(b"c%d" % i for i in range(100_000)) + b"\n",
            "columns-twice": b"label,label\na,b\n",
            "label-foreign": head + b"the cat,../../../etc/passwd\n",
            "label-markup": head + b"the cat,<script>alert(1)</script>\n",
            "label-empty": head + b"the cat,\n",
            "text-empty": head + b",plain\n",
            "one-line-of-megabytes": b"x" * 20_000_000,
            "bzip2": b"BZh91AY&SY" + head,
            "utf-16-without-mark": (head + b"the cat,plain\n").decode().encode("utf-16-le"),
            "invalid-at-the-end": head + b"the cat,plain\n" * 300_000 + b"\xff",
        }.items()
    ]
    out += [
        data("csv-huge-field", head + b"cat " * 2_000_000 + b",plain\n", "csv", "harmless"),
        data("csv-a-zip-bomb", packed),
        data("csv-escapes", head + b"the \x1b[2J cat,plain\n", "csv", "harmless"),
        data("parquet-three-million-rows", repeated, "parquet"),
        data("parquet-of-csv", written("csv"), "parquet"),
        data("csv-of-parquet", written("parquet")),
        data("name-with-brackets", written("csv"), "[a]*.csv", "harmless"),
        data("name-with-colons", written("csv"), "zip::x.csv", "either"),
        data("suffix-pickle", b"\x80\x04.", "pkl"),
        data("suffix-none", written("csv"), "CSV", "harmless"),
        data(
            "column-of-a-path", written("csv"), "csv", "refused", "--label_column_name", "../../x"
        ),
    ]
    return out
