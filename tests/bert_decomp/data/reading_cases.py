"""What the tests of readers share: a file put down, read as a model's examples, or refused in one line."""

import pytest

from bert_decomp.data.files import load_labelled
from bert_decomp.data.model_labels import ModelLabels
from bert_decomp.errors import UserError

MODEL = ModelLabels.named("negative", "positive")
SCORE = ModelLabels(1, None)


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def read(path, model=MODEL, **options):
    data, reading = load_labelled(path, model, **options)
    assert reading.rows == len(data) + sum(reading.left_out.values())
    return data.to_dict(), reading


def refused(word, call, *arguments, **options):
    with pytest.raises(UserError, match=word) as refusal:
        call(*arguments, **options)
    message = str(refusal.value)
    assert "\n" not in message and "--" not in message
    return message
