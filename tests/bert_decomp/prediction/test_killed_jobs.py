"""Whatever is killed on the way of a prediction, nothing is lost, doubled or taken from another job."""

import json
import multiprocessing
import os
import signal
import sys
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prediction.files import ROWS, written
from prediction.refusals import refused

from bert_decomp.cli.command import command
from bert_decomp.cli.predict import main
from bert_decomp.data import windows
from bert_decomp.errors import UserError
from bert_decomp.prediction import workers
from bert_decomp.prediction.predict import predict


class Killed:
    """A run in a process of its own that is killed at its n-th change of the file system, if it has so many."""

    CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")

    def __init__(self, job, count):
        child = os.fork()
        if child == 0:
            left = count

            def hook(event, arguments):
                nonlocal left
                writing = event == "open" and "w" in str(arguments[1] or "")
                if event in self.CHANGES or writing:
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            job()
            os._exit(0)
        self.finished = os.WIFEXITED(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("names", [["out.parquet"], ["out.jsonl", "out.jsonl.job"]])
def test_a_kill_at_any_change_of_the_file_system_loses_and_doubles_nothing(
    names, model, table, tmp_path, monkeypatch
):
    monkeypatch.setattr(windows, "WINDOW_ROWS", 27)
    path = written(tmp_path, table)

    def job(folder):
        output = folder / names[0]
        done = predict(model, path, output, keep_columns=["id"], progress=False)
        return done, output.read_bytes()

    _, whole = job(tmp_path)
    kept = []
    for count in range(100):
        folder = tmp_path / str(count)
        folder.mkdir()
        finished = Killed(lambda folder=folder: job(folder), count).finished
        done, again = job(folder)
        assert again == whole
        assert sorted(file.name for file in folder.iterdir()) == names
        kept.append(ROWS - done.texts)
        if finished:
            break
    # Killed before the first shard is whole, between the two, and after: what is whole is never computed again.
    assert finished and kept == sorted(kept) and set(kept) == {0, 27, ROWS}


@pytest.mark.slow
def test_processes_give_the_same_and_a_killed_job_goes_on(model, table, tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_ROWS", 5)
    path, parts = written(tmp_path, table), tmp_path / "two.parquet.parts"

    def job(name, processes=1):
        return predict(model, path, tmp_path / name, processes=processes, progress=False)

    first = os.fork()
    if first == 0:
        job("two.parquet", 2)
        os._exit(0)
    end = time.monotonic() + 100
    while len(list(parts.glob("0*"))) < 3:
        assert time.monotonic() < end
        time.sleep(0.001)
    team = psutil.Process(first).children(recursive=True)
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    assert len(team) >= 2 and not psutil.wait_procs(team, timeout=30)[1]
    done, _ = job("two.parquet"), job("one.parquet")
    assert done.rows == ROWS and done.texts <= ROWS - 15
    assert pq.read_table(tmp_path / "two.parquet").equals(pq.read_table(tmp_path / "one.parquet"))
    found = sorted(file.name for file in tmp_path.glob("*.parquet*"))
    assert found == ["one.parquet", "two.parquet"]


class Gone:
    """A process that was killed."""

    exitcode = -9

    def join(self):
        pass


def test_a_process_that_dies_or_reports_an_error_is_one_line():
    ours, theirs = multiprocessing.Pipe()
    for message, words in (
        ({"error": "no"}, "^no$"),
        ({"defect": "Traceback"}, "in a process"),
        (None, "a process ended with code -9"),
    ):
        if message is None:
            theirs.close()
        else:
            theirs.send_bytes(json.dumps(message).encode())
        with pytest.raises((UserError, RuntimeError), match=words):
            workers._attend(ours, {ours: Gone()}, iter(()), lambda *counts: None)


def test_another_job_takes_no_shard_and_no_output_of_this_one(model, table, tmp_path, capsys):
    path, output = written(tmp_path, table), tmp_path / "out.parquet"
    parts = tmp_path / "out.parquet.parts"
    parts.mkdir()
    (parts / "job.json").write_text('{"input": "another"}')
    line = [model, path, "--output", str(output)]
    refused(capsys, line, "first part of another job (input, ")
    (parts / "job.json").unlink()
    # A shard of another job, and one that is cut off, are computed again.
    pq.write_table(pa.table({"label": ["x"] * ROWS}), parts / "0000000.parquet")
    assert command(main, line) == 0
    assert command(main, line) == 0
    assert "all from an earlier run" in capsys.readouterr().out
    refused(capsys, [*line, "--max_seq_length", "9"], "was not made of this input by this model")
    assert pq.read_metadata(output).num_rows == ROWS
