"""Any table that csv, pandas, pyarrow, a spreadsheet or ``datasets`` writes comes back equal, or is refused by name."""

import csv
import io
import json

import pandas as pd
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bert_decomp.data.files import load_labelled
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.data.tables import read_table
from bert_decomp.errors import UserError

pytestmark = pytest.mark.slow

# What writers and readers stumble on: quotes, delimiters, line ends, words for missing values, numbers, signs of
# formulas.
PIECES = [
    '"',
    '""',
    ",",
    ";",
    "\t",
    "|",
    "\n",
    "\r\n",
    "\r",
    " ",
    "a",
    "the cat",
    "é",
    "\u2028",
    "\x85",
]
WORDS = [
    "NA",
    "None",
    "null",
    "nan",
    "N/A",
    "01",
    "1.0",
    "1e5",
    "-3",
    "=1+2",
    "2020-01-01",
    "True",
    "sep=;",
    "",
]
TEXT = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=6).map("".join),
    st.sampled_from(WORDS),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
)
NAMES = st.sampled_from([("text", "label"), ("text",), ("sentence1", "sentence2", "label")])


@st.composite
def tables(draw):
    names = draw(NAMES)
    row = st.tuples(*[TEXT for _ in names])
    return names, draw(st.lists(row, min_size=1, max_size=8))


def with_csv(dialect, **options):
    def write(path, names, rows):
        with path.open("w", newline="", encoding=options.get("encoding", "utf-8")) as file:
            more = {name: value for name, value in options.items() if name != "encoding"}
            writer = csv.writer(file, dialect, **more)
            writer.writerow(names)
            writer.writerows(rows)

    return write


def with_pandas(**options):
    def write(path, names, rows):
        pd.DataFrame(rows, columns=list(names)).to_csv(path, index=False, **options)

    return write


def with_pyarrow(**options):
    def write(path, names, rows):
        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        pyarrow.csv.write_csv(pyarrow.table(columns), path, pyarrow.csv.WriteOptions(**options))

    return write


def parquet(path, names, rows):
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def pandas_json(**options):
    def write(path, names, rows):
        pd.DataFrame(rows, columns=list(names)).to_json(path, orient="records", **options)

    return write


def json_lines(path, names, rows):
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")


def datasets_of(method):
    def write(path, names, rows):
        columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        getattr(Dataset.from_dict(columns), method)(path)

    return write


WRITERS = {
    "csv": (".csv", with_csv("excel")),
    "csv of Excel with semicolons": (".csv", with_csv("excel", delimiter=";")),
    "csv with tabs": (".csv", with_csv("excel-tab")),
    "csv of Unix": (".csv", with_csv("unix")),
    "csv in UTF-16": (".csv", with_csv("excel", encoding="utf-16")),
    "csv with a byte order mark": (".csv", with_csv("excel", encoding="utf-8-sig")),
    "tsv of Excel": (".tsv", with_csv("excel-tab")),
    "tsv of Excel, all quoted": (".tsv", with_csv("excel-tab", quoting=csv.QUOTE_ALL)),
    "pandas csv": (".csv", with_pandas()),
    "pandas csv with semicolons": (".csv", with_pandas(sep=";")),
    "pandas tsv": (".tsv", with_pandas(sep="\t")),
    "pandas csv, all quoted": (".csv", with_pandas(quoting=csv.QUOTE_ALL)),
    "pyarrow csv": (".csv", with_pyarrow()),
    "pyarrow csv, all quoted": (".csv", with_pyarrow(quoting_style="all_valid")),
    "pyarrow tsv": (".tsv", with_pyarrow(delimiter="\t")),
    "pyarrow parquet": (".parquet", parquet),
    "pandas json": (".json", pandas_json()),
    "pandas json-lines": (".jsonl", pandas_json(lines=True)),
    "json-lines": (".jsonl", json_lines),
    "datasets csv": (".csv", datasets_of("to_csv")),
    "datasets json-lines": (".jsonl", datasets_of("to_json")),
    "datasets parquet": (".parquet", datasets_of("to_parquet")),
}
FAITHFUL = [name for name, (suffix, _) in WRITERS.items() if suffix not in (".csv", ".tsv")]
COMMON = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def written_and_read(tmp_path, writer, names, rows):
    suffix, write = WRITERS[writer]
    path = tmp_path / f"table{suffix}"
    path.unlink(missing_ok=True)
    write(path, names, rows)
    return read_table(str(path))


@pytest.mark.parametrize("writer", WRITERS)
@COMMON
@given(table=tables())
def test_a_table_comes_back_equal_or_is_refused_by_name(tmp_path, writer, table):
    names, rows = table
    try:
        result = written_and_read(tmp_path, writer, names, rows)
    except UserError as refusal:
        assert "table." in str(refusal) and "\n" not in str(refusal).replace(str(tmp_path), "")
        assert writer not in FAITHFUL, refusal
        return
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    if any(note.startswith("lines end in two ways") for note in result.notes):
        # pandas does not quote a carriage return; before its line feed it is the line's end for every reader.
        assert "pandas" in writer or "datasets" in writer
        columns[names[-1]] = [value.removesuffix("\r") for value in columns[names[-1]]]
    assert result.columns == columns


SENTENCES = st.text("abc é", min_size=1, max_size=9).filter(str.strip)


@pytest.mark.parametrize("writer", WRITERS)
@COMMON
@given(rows=st.lists(st.tuples(SENTENCES, st.sampled_from(["x", "y"])), min_size=1, max_size=8))
def test_ordinary_sentences_are_never_refused(tmp_path, writer, rows):
    result = written_and_read(tmp_path, writer, ("text", "label"), rows)
    assert list(zip(result.columns["text"], result.columns["label"], strict=True)) == rows
    data, reading = load_labelled(result.path, ModelLabels.named("x", "y"))
    assert data["text"][:] == [text for text, _ in rows] and reading.rows == len(rows)
    assert ["xy"[number] for number in data["label"]] == [label for _, label in rows]


# A file of any bytes is read or refused, and what is read is every row of it.


@COMMON
@given(text=st.lists(st.sampled_from([*PIECES, "text", "label"]), max_size=30).map("".join))
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_any_text_is_a_table_or_refused(tmp_path, suffix, text):
    path = tmp_path / f"any{suffix}"
    path.write_bytes(text.encode())
    try:
        table = read_table(str(path))
    except UserError:
        return
    assert len({len(column) for column in table.columns.values()}) == 1
    if suffix == ".tsv" and '"' not in text:
        lines = [
            line
            for line in io.StringIO(text, newline="\n" if "\n" in text else "")
            if line.strip("\r\n")
        ]
        assert len(table) == len(lines) - 1
