"""What a kill, a full disk, a lack of memory or a second run does: one line, nothing lost; a later run ends the same.

The long forms, on the embedded encoder, are in tests/robustness.
"""

import errno
import multiprocessing
import os
import resource
from functools import partial

import pytest
import torch
from cases import arguments
from tiny_models import tiny_model
from tqdm.auto import tqdm

from benchmarks.records import read_suite
from bert_decomp.cli import compress
from bert_decomp.cli.command import command
from bert_decomp.config import DecompositionConfig
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.distillation import teacher
from bert_decomp.errors import UserError
from bert_decomp.io.atomic import (
    atomic_file,
    atomic_folder,
    exclusive_lock,
    remove,
    remove_leftovers,
)
from bert_decomp.models.saving import save
from bert_decomp.pipeline import run, run_folder
from bert_decomp.runtime import fuse_
from tests.robustness.job import Job
from tests.robustness.serving import serve


def result_of(folder):
    job = Job(folder, {})
    assert not job.leftovers()
    return job.result()


@pytest.fixture
def job(data, encoder_folder):
    """The tiny job's arguments for a folder of its own."""

    def line(name, **changes):
        return arguments(
            data,
            encoder_folder,
            f"{name}/run",
            **{"cache_dir": data / name / "cache", "teacher_num_train_epochs": 1, **changes},
        )

    return line


def refused(capsys, line, *words):
    """The command must fail with code 2 and one line that has these words."""
    capsys.readouterr()
    assert command(compress.main, line) == 2
    lines = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").splitlines()
        if line.startswith("error: ")
    ]
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


@pytest.mark.slow
def test_a_full_disk_and_what_kills_leave_behind_change_nothing_in_the_end(
    tmp_path, job, capsys, monkeypatch
):
    """A limit on the size of files stands for the disk: each higher one lets the run come further.

    Then what kills leave at inconvenient moments, all together; at last a kill while an older run is being discarded.
    """
    assert command(compress.main, job("whole")) == 0
    expected = result_of(tmp_path / "whole")
    real = save

    def interrupted(model, tokenizer, folder):
        if "decomposed" not in str(folder):
            raise KeyboardInterrupt
        real(model, tokenizer, folder)

    sizes = sorted(
        {path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    )
    cut, unlimited, kept = (
        tmp_path / "cut" / "run",
        resource.getrlimit(resource.RLIMIT_FSIZE),
        set(),
    )
    cut.mkdir(parents=True)
    (cut / ".partial-run.json-0123abcd").write_text(
        '{"opt'
    )  # killed while the folder was being made a run's
    for module in (
        teacher,
        run,
    ):  # stopped after the last step of each training, before its model is saved
        monkeypatch.setattr(module, "save", interrupted)
        refused(capsys, job("late"), "interrupted")
        monkeypatch.undo()
    assert command(compress.main, job("late")) == 0
    assert result_of(tmp_path / "late") == expected
    for limit in (64, sizes[-2] // 2, sizes[-1] - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            refused(capsys, job("cut"), "write", "free space")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        found = {
            path for path in (tmp_path / "cut").rglob("*.json") if "-training" not in str(path)
        }
        assert kept <= found, "earlier results are gone"
        kept = found
    assert command(compress.main, job("cut")) == 0
    assert result_of(tmp_path / "cut") == expected

    cached = next((tmp_path / "cut" / "cache" / "teachers").iterdir())
    for folder in (
        cut / "checkpoints" / "checkpoint-3",
        cached.with_name(f"{cached.name}-training") / "checkpoint-3",
        cut / ".partial-model-0123abcd",
    ):
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(bytes(9))
    assert command(compress.main, job("cut")) == 0
    assert result_of(tmp_path / "cut") == expected

    removed = []

    def killed(path):
        if len(removed) == 3:
            raise KeyboardInterrupt
        removed.append(path)
        remove(path)

    monkeypatch.setattr(run_folder, "remove", killed)
    refused(
        capsys,
        job("cut", overwrite_output_dir=True),
        "interrupted",
        "without --overwrite_output_dir",
    )
    assert (cut / "run.json").is_file() and len(removed) == 3
    monkeypatch.undo()
    assert command(compress.main, job("cut")) == 0
    assert result_of(tmp_path / "cut") == expected


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("could not create a primitive"),
    ],
)
def test_a_lack_of_memory_is_one_line(capsys, monkeypatch, error):
    def fail(_arguments):
        raise error

    assert command(fail, []) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("error: the memory is not enough")
        and "continues from here" in said
        and said.count("\n") == 1
    )
    monkeypatch.setattr(tqdm, "monitor", None)
    # Its thread could die before it says that it started, and then whoever draws a bar waits forever.
    assert command(lambda _: list(tqdm(range(2), disable=False)), []) == 0 and tqdm.monitor is None
    with pytest.raises(RuntimeError, match="a defect"):
        command(lambda _: (_ for _ in ()).throw(RuntimeError("a defect")), [])


def test_a_file_that_vanishes_between_check_and_use_is_one_line(tmp_path, job, capsys, monkeypatch):
    def vanish(*args, **kwargs):
        (tmp_path / "train.csv").unlink()
        return load(*args, **kwargs)

    from bert_decomp.data import delimited

    load = delimited.check_csv
    monkeypatch.setattr(delimited, "check_csv", vanish)
    refused(capsys, job("gone"), "train.csv")
    assert not (tmp_path / "gone").exists()


def _hold(folder, ready, release):
    with exclusive_lock(folder):
        ready.set()
        release.wait()


def test_one_process_at_a_time_works_in_a_folder(tmp_path, job, capsys, monkeypatch):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    folder = tmp_path / "held" / "run"
    holder = context.Process(target=_hold, args=(folder, ready, release))
    holder.start()
    ready.wait()
    monkeypatch.setattr(run_folder, "exclusive_lock", partial(exclusive_lock, seconds=0.1))
    refused(capsys, job("held"), "another process is at work")
    assert not list(folder.iterdir())
    holder.kill()
    holder.join()
    with exclusive_lock(folder, seconds=1):
        pass


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file is flushed before the rename, and the folder that names it after."""
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle)),
    )
    monkeypatch.setattr(
        os, "replace", lambda old, new: (events.append(f"-> {new}"), replace(old, new))
    )
    with atomic_file(tmp_path / "one") as temporary:
        temporary.write_text("x")
    assert events[0].startswith(str(tmp_path / ".partial-one")) and events[0].endswith("/one")
    assert events[1:] == [f"-> {tmp_path / 'one'}", str(tmp_path)]
    events.clear()
    with atomic_folder(tmp_path / "two") as temporary:
        (temporary / "a").mkdir()
        (temporary / "a" / "b").write_text("x")
    names = [
        event.removeprefix(str(tmp_path)).partition("/.partial-two-")[2][8:] for event in events[:3]
    ]
    assert names == ["/a", "/a/b", ""] and events[3:] == [f"-> {tmp_path / 'two'}", str(tmp_path)]
    (tmp_path / ".partial-two-x").touch()
    (tmp_path / ".partial-three-x").touch()
    remove_leftovers(tmp_path, "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-three-x", "one", "two"]
    with pytest.raises(UserError, match="cannot write"), atomic_file(tmp_path / "one" / "below"):
        pass
    # What a library drops beside the file that it writes goes, too.
    with atomic_file(tmp_path / "one") as temporary:
        temporary.with_name(".tmp123").touch()
        temporary.write_text("y")
    assert (tmp_path / "one").read_text() == "y" and not list(tmp_path.rglob(".tmp*"))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "mpnet", "modernbert"])
def test_eight_threads_get_the_answers_of_one(tokenizer, family):
    model = tiny_model(family, num_labels=3)
    decompose_(model, DecompositionConfig(method="svd", rank=7), progress=False)
    texts = [
        "the red cat sees a dog",
        "the owl",
        "a cow sees the blue hen sees a grey cat",
        "green",
    ]
    found = serve(
        fuse_(model),
        tokenizer,
        [[text] for text in texts] + [texts[:2], texts],
        threads=8,
        seconds=1.0,
        length=16,
        progress=False,
    )
    assert found["requests"] > 8 and found["errors"] == found["different"] == 0, found["failures"]


def test_results_of_the_long_drivers_have_no_failure():
    """What is committed passed."""
    found = {record["name"]: record for record in read_suite("robustness")}
    assert (
        found["serving"]["requests"] > 1000
        and found["serving"]["errors"] == found["serving"]["different"] == 0
    )
    assert (
        found["kill"]["kills"] >= 50
        and found["faults"]["faults"] >= 16
        and found["malformed"]["inputs"] >= 200
    )
    assert found["malformed"]["failed"] == found["fuzz"]["findings"] == 0
    assert [found[name]["failures"] for name in ("kill", "faults", "operators")] == [[], [], []]
