"""Every odd file of ``tests/robustness/odd_file_cases.py`` is read row by row, or refused with the words expected."""

from types import SimpleNamespace

import pytest

from bert_decomp.data.files import load_files, load_labelled
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.errors import UserError
from tests.robustness.odd_file_cases import FILES, MODELS

MINIMUM = 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_an_odd_file_is_read_or_refused(tmp_path, file):
    path = str(file.write(tmp_path))
    count = MODELS[file.model]["num_labels"]
    placeholders = {index: f"LABEL_{index}" for index in range(count)}
    names = MODELS[file.model].get("id2label", placeholders)
    model = ModelLabels.of(SimpleNamespace(num_labels=count, id2label=names), "model")
    named = dict(zip(file.options[::2], file.options[1::2], strict=True))
    options = {
        "text_column_names": named["--text_column_names"].split(",")
        if "--text_column_names" in named
        else None,
        "label_column_name": named.get("--label_column_name", "label"),
    }
    if isinstance(file.expect, str):
        for read in (
            lambda: load_labelled(path, model, **options),
            lambda: load_files(path, path, model=model, **options),
        ):
            with pytest.raises(UserError, match=file.expect):
                read()
        return
    data, reading = load_labelled(path, model, **options)
    assert len(data) == file.expect == reading.rows and not reading.left_out
    task = load_files(path, path, model=model, **options)
    assert task.train.to_dict() == task.validation.to_dict() == data.to_dict()


def test_there_are_many_and_their_names_differ():
    assert len({file.name for file in FILES}) == len(FILES) >= MINIMUM
