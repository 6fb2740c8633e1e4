"""What commands do with their output: end quietly when nobody reads it, say in one line that it cannot be written."""

import io
import logging
import os
import subprocess
import sys

import pytest
from tqdm import tqdm

from bert_decomp.cli.command import READER_GONE, LineHandler, command
from bert_decomp.cli.compress import main as compress
from bert_decomp.cli.main import COMMANDS

EVERY = (
    "import os, sys\n"
    "from bert_decomp.cli.command import command\n"
    "from bert_decomp.cli.main import main\n"
    "stdout = os.dup(1)\n"
    "for name in sys.argv[1:]:\n"
    "    os.dup2(stdout, 1)\n"
    "    print(command(main, [*name.split(), '--help']), file=sys.stderr)\n"
)


def run(line, stdout, unbuffered=""):
    variables = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(
        [sys.executable, *line], stdout=stdout, stderr=subprocess.PIPE, text=True, env=variables
    )


def test_what_is_logged_stands_on_a_line_of_its_own_above_a_bar(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    handler = LineHandler()
    with tqdm(total=2, file=stderr) as bar:
        handler.emit(logging.makeLogRecord({"msg": "int8: outputs differ"}))
        bar.update()
    handler.emit(logging.makeLogRecord({"msg": "done"}))
    lines = [line.rpartition("\r")[2] for line in stderr.getvalue().strip().split("\n")]
    assert lines[0] == "int8: outputs differ" and lines[-1] == "done" and "0/2" in stderr.getvalue()


@pytest.fixture
def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_every_command_ends_quietly_where_nobody_reads(closed_pipe, unbuffered):
    names = ["", *COMMANDS]
    done = run(["-c", EVERY, *names], closed_pipe, unbuffered)
    assert done.stderr.split() == [str(READER_GONE)] * len(names)
    assert done.returncode == 0


@pytest.mark.slow
def test_the_exit_code_is_that_of_a_program_which_the_signal_ended(closed_pipe):
    for line in (["-m", "bert_decomp.evaluate", "--help"], ["-m", "lowrank_kernels.env"]):
        done = run(line, closed_pipe)
        assert (done.returncode % 256, done.stderr) in ((READER_GONE, ""), (256 - 13, "")), line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "w") as full:
        done = run(["-m", "bert_decomp.evaluate", "--help"], full)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


def test_a_broken_pipe_of_another_kind_is_a_failure(capsys):
    def main(_):
        raise BrokenPipeError(32, "Broken pipe", "socket")

    assert command(main, []) == 2
    assert "cannot read or write socket" in capsys.readouterr().err


def test_help_fits_two_screens_and_help_all_has_every_option(capsys):
    compress(["--help"])
    short = capsys.readouterr().out
    compress(["--help-all"])
    full = capsys.readouterr().out
    assert len(short.splitlines()) <= 70 < len(full.splitlines())
    options = [line.split()[0] for line in short.splitlines() if line.startswith("  --")]
    assert "--encoder_fraction" in options and set(options) <= set(full.split())
    assert "--help-all" in short and "--share_qkv" in full
