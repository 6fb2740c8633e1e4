"""What the command ``predict`` says of input that it cannot use."""

from bert_decomp.cli.command import command
from bert_decomp.cli.predict import main


def refused(capsys, line, words):
    assert command(main, line) == 2
    errors = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in x]
    assert len(errors) == 1 and words in errors[0], errors
