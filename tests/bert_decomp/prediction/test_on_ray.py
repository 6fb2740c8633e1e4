"""On Ray the output is that of the local engine to the bit, and each goes on where the other was killed."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pyarrow.parquet as pq
import pytest
from optional import needs
from prediction.refusals import refused
from tiny_models import ANIMALS, COLOURS, tiny_model, tiny_tokenizer

from bert_decomp import DecompositionConfig, decompose_
from bert_decomp.data import windows
from bert_decomp.models.saving import save
from bert_decomp.prediction import on_ray
from bert_decomp.prediction.predict import predict

# Windows of 27 rows, a last one that is smaller.
ROWS = 251


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "class"
    model = tiny_model("bert", id2label={0: "cold", 1: "mild", 2: "hot"}, num_hidden_layers=1)
    decompose_(model, DecompositionConfig("svd", rank=7), progress=False)
    save(model, tiny_tokenizer(), folder)
    return str(folder)


@pytest.fixture
def texts(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW_ROWS", 27)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "in.csv"
    rows = [
        f"{i},{' '.join([COLOURS[i % 4], ANIMALS[i % 5], *['sees', 'a', 'dog'] * (i * 7 % 11)])}"
        for i in range(ROWS)
    ]
    path.write_text("\n".join(["id,text", *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster to which this process is connected: starting one takes longer than a test."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


# What a user's shell would start, with windows as small as the fixture's.
JOB = """
import sys
from bert_decomp.cli.command import command
from bert_decomp.cli.predict import main
from bert_decomp.data import windows
windows.WINDOW_ROWS = 27
sys.exit(command(main, sys.argv[1:]))
"""


def started(model, texts, output, *options):
    line = [model, texts, "--output", str(output), "--keep_columns", "id", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", JOB, *line], env=environment, stderr=subprocess.PIPE, text=True
    )


def family(pid=None):
    return psutil.Process(pid).children(recursive=True)


def wait_for(condition):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@needs("ray")
@pytest.mark.slow
def test_the_output_is_that_of_the_local_engine(cluster, model, texts, tmp_path):
    files = []
    for engine, processes in (("local", 1), ("ray", 2)):
        output = tmp_path / f"{engine}.parquet"
        done = predict(
            model,
            texts,
            output,
            keep_columns=["id"],
            processes=processes,
            engine=engine,
            progress=False,
        )
        assert done.rows == done.texts == ROWS
        files.append((output.read_bytes(), done.tokens))
    assert files[0] == files[1]
    assert not list(tmp_path.glob("*.parts"))


@needs("ray")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stopped_job_goes_on_with_either_engine(number, model, texts, tmp_path):
    output, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    job = started(model, texts, output, "--engine", "ray", "--processes", "2")
    wait_for(lambda: len(list(parts.glob("0*"))) >= 2)
    # Ray's own agents notice the loss of their parent in a minute or two.
    team = [one for one in family(job.pid) if "Agent" not in one.name()]
    job.send_signal(number)
    message = job.communicate()[1]
    assert job.returncode == (2 if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert message.splitlines()[-1].startswith("error: interrupted; nothing is half-written")
    assert len(team) >= 4 and not psutil.wait_procs(team, timeout=60)[1]
    kept = len(list(parts.glob("0*")))
    done = predict(model, texts, output, keep_columns=["id"], progress=False)
    assert done.texts == ROWS - 27 * kept
    whole = tmp_path / "whole.parquet"
    predict(model, texts, whole, keep_columns=["id"], progress=False)
    assert pq.read_table(output).equals(pq.read_table(whole))


@needs("ray")
@pytest.mark.slow
def test_a_lost_actor_is_started_again_and_its_window_answered(cluster, model, texts, tmp_path):
    output, parts = tmp_path / "out.parquet", tmp_path / "out.parquet.parts"
    options = {"keep_columns": ["id"], "processes": 2, "engine": "ray", "progress": False}
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(predict, model, texts, output, **options)
        wait_for(lambda: job.done() or len(list(parts.glob("0*"))) >= 1)
        assert not job.done(), job.result()
        actors = [one for one in family() if one.name().startswith("ray::Worker")]
        for actor in actors:
            actor.kill()
        assert actors and job.result().texts == ROWS
    assert pq.read_table(output)["id"].to_pylist() == list(map(str, range(ROWS)))


@needs("ray")
@pytest.mark.slow
def test_a_cluster_that_is_there_is_used_and_what_it_lacks_is_one_line(
    cluster, model, texts, tmp_path, capsys, monkeypatch
):
    line = [model, texts, "--engine", "ray", "--output"]
    job = started(
        model, texts, tmp_path / "out.parquet", "--engine", "ray", "--ray_address", cluster
    )
    message = job.communicate()[1]
    assert job.returncode == 0, message
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == ROWS
    refused(
        capsys,
        [*line, str(tmp_path / "one.parquet"), "--processes", "3"],
        "--processes 3 is more than the CPUs of the Ray cluster, 2",
    )
    # A model that changed after the job began, as on a machine with another folder.
    monkeypatch.setattr(
        "bert_decomp.prediction.predict.fingerprint_of_checkpoint", lambda folder: "another"
    )
    refused(
        capsys,
        [*line, str(tmp_path / "two.parquet")],
        "every machine needs the same folder under that path",
    )


@pytest.mark.parametrize(
    "options, words",
    [
        (["--engine", "spark"], "--engine is 'spark'; choose one of local, ray"),
        (["--ray_address", "auto"], "--ray_address is not for engine local"),
        (
            ["--engine", "ray", "--ray_address", "here"],
            "--ray_address is 'here'; give HOST:PORT, or auto",
        ),
        (
            ["--engine", "ray", "--ray_address", "127.0.0.1:1"],
            "no Ray cluster answers at 127.0.0.1:1",
        ),
    ],
)
def test_bad_options_are_one_line(options, words, model, texts, tmp_path, capsys):
    if "ray" in options:
        pytest.importorskip("ray")
    refused(capsys, [model, texts, "--output", str(tmp_path / "out.parquet"), *options], words)
    assert not (tmp_path / "out.parquet").exists()


def test_without_ray_one_line_says_what_to_install(model, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ray" else name)
    line = [model, texts, "--output", str(tmp_path / "out.parquet"), "--engine", "ray"]
    refused(capsys, line, "ray is not installed; pip install 'lowrank-bert[ray]'")
    assert [file.name for file in tmp_path.iterdir()] == ["in.csv"]


def test_every_process_finds_a_place_on_one_machine():
    for units, processes in (([8, 4, 4], 3), ([3, 1], 2), ([16], 16), ([5, 7, 1], 4)):
        each = on_ray.units_each(units, processes)
        assert sum(x // each for x in units) >= processes
        assert sum(x // (each + 1) for x in units) < processes
