"""A saved classifier, and a table of texts for it."""

import pyarrow as pa
import pytest
from prediction.files import ROWS, saved, texts


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    names = {0: "cold", 1: "mild", 2: "hot"}
    return saved(tmp_path_factory.mktemp("models") / "class", id2label=names, num_hidden_layers=1)


@pytest.fixture(scope="module")
def table():
    return pa.table({"id": [f"r{i}" for i in range(ROWS)], "n": range(ROWS), "text": texts()})
