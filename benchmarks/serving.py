"""Load on 127.0.0.1: our server, and sentence-transformers behind the same server: ``python -m benchmarks.serving``.

The model is all-MiniLM-L6-v2: in sentence-transformers; in the fused runtime; with its matrices factored to a quarter
there; and with a quarter of its heads and neurons in int8. Each server is a process with one thread for the model; the
clients, threads of this process, share the cores with it. Measured are what the server adds to the model's time at
batch 8 of about 128 tokens, one request at a time; throughput and latency of requests of one movie sentence from many
clients; many connections at once; and the most clients again, for ``--soak`` seconds, and the memory meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bert_decomp.cli.command import command
from bert_decomp.config import DecompositionConfig
from bert_decomp.data.demo import MINILM, resolve_model
from bert_decomp.data.task import load_task
from bert_decomp.decomposition.decompose import decompose_
from bert_decomp.io.environment import environment
from bert_decomp.models.loading import load_encoder, load_tokenizer
from bert_decomp.models.saving import save
from bert_decomp.prediction.predictor import Predictor
from bert_decomp.runtime import fuse_

from .records import save_record, suite_file

RIVAL = "sentence-transformers"


class Rival(Predictor):
    """sentence-transformers in the place of the fused model."""

    def __init__(self, folder: str):
        from sentence_transformers import SentenceTransformer

        super().__init__(folder)
        self.rival = SentenceTransformer(folder, device="cpu").eval()

    @torch.inference_mode()
    def outputs(self, encoded: Any, rows: Any) -> np.ndarray:
        return self.rival(self._batch(encoded, rows))["sentence_embedding"].numpy()


def serve(form: str, folder: str) -> None:
    """A server on a free port, which is printed."""
    import socket

    from bert_decomp.serving.server import server

    torch.set_num_threads(1)
    predictor = Rival(folder) if form == RIVAL else Predictor(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(port, flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # how uvicorn hands on the signal that stopped it
        server(predictor, form, "127.0.0.1", port).run()


def post(connection: HTTPConnection, texts: list[str]) -> int:
    """The status of one request."""
    connection.request("POST", "/v1/embeddings", json.dumps({"input": texts}))
    response = connection.getresponse()
    response.read()
    return response.status


def model_seconds(port: int) -> tuple[float, float]:
    """Seconds in the model since the start, and its batches."""
    connection = HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    sums = [
        re.search(rf"^lowrank_bert_batch_seconds_{what} (\S+)$", text, re.M)
        for what in ("sum", "count")
    ]
    return float(sums[0][1]), float(sums[1][1])  # type: ignore[index]


def overhead(port: int, texts: list[str], seconds: float) -> dict[str, float]:
    """Batch 8, one request at a time: milliseconds of a request, of the model in it, and the share of the rest."""
    connection, times = HTTPConnection("127.0.0.1", port), []
    post(connection, texts)
    before, end = model_seconds(port)[0], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        assert post(connection, texts) == 200
        times.append(time.perf_counter() - start)
    inside = (model_seconds(port)[0] - before) / len(times)
    whole = sum(times) / len(times)
    return {"ms": 1e3 * whole, "model_ms": 1e3 * inside, "overhead": whole / inside - 1}


def load(port: int, texts: list[str], clients: int, seconds: float) -> dict[str, float]:
    """Requests of one text from many clients: their number a second, and quantiles of their time."""
    times: list[float] = []
    end, failed = time.perf_counter() + seconds, 0
    lock = threading.Lock()

    def client(number: int) -> None:
        nonlocal failed
        connection, place = HTTPConnection("127.0.0.1", port), number
        while time.perf_counter() < end:
            start = time.perf_counter()
            status = post(connection, [texts[place % len(texts)]])
            with lock:
                times.append(time.perf_counter() - start)
                failed += status != 200
            place += clients

    before = model_seconds(port)[1]
    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    low, high, highest = np.quantile(times, (0.5, 0.95, 0.99))
    return {
        "clients": clients,
        "requests_a_second": len(times) / seconds,
        "p50_ms": 1e3 * low,
        "p95_ms": 1e3 * high,
        "p99_ms": 1e3 * highest,
        "failed": failed,
        "texts_a_batch": len(times) / (model_seconds(port)[1] - before),
    }


def connections(port: int, texts: list[str], count: int) -> int:
    """How many of ``count`` connections, all open before the first request, got their answer."""
    opened = [HTTPConnection("127.0.0.1", port, timeout=120) for _ in range(count)]
    for one in opened:
        one.connect()
    for place, one in enumerate(opened):
        one.request("POST", "/v1/embeddings", json.dumps({"input": texts[place % len(texts)]}))
    return sum(one.getresponse().status == 200 for one in opened)


def soak(
    process: subprocess.Popen, port: int, texts: list[str], clients: int, seconds: float
) -> tuple[dict[str, float], list[float]]:
    """``load``, and the process's megabytes before and every twentieth of the time."""
    megabytes = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(load, port, texts, clients, seconds)
        while True:
            megabytes.append(psutil.Process(process.pid).memory_info().rss / 1e6)
            with contextlib.suppress(TimeoutError):
                return running.result(seconds / 20), megabytes


def measure(
    form: str, folder: str, seconds: float, counts: list[int], soak_seconds: float
) -> dict[str, Any]:
    """Everything of one form."""
    line = [sys.executable, "-m", "benchmarks.serving", "--serve", form, "--folder", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        while True:
            try:
                model_seconds(port)
                break
            except OSError:
                time.sleep(0.1)
        sentences = list(load_task("movies").validation["text"])
        long = [" ".join(sentences[place : place + 12]) for place in range(8)]
        long = [" ".join(text.split()[:90]) for text in long]
        row: dict[str, Any] = {"form": form, "batch_8": overhead(port, long, seconds)}
        row["load"] = [load(port, sentences, count, seconds) for count in counts]
        row["connections"] = {"opened": 1000, "answered": connections(port, sentences, 1000)}
        row["load_again"], row["megabytes"] = soak(
            process, port, sentences, counts[-1], soak_seconds
        )
        return row
    finally:
        process.terminate()
        process.wait()


def compressed(dense: str, folder: Path) -> dict[str, str]:
    """Folders of the embedder at a quarter, without training."""
    tokenizer = load_tokenizer(MINILM)
    texts = list(load_task("movies").train["text"])[:256]
    batches = [
        tokenizer(texts[place : place + 32], padding=True, truncation=True, return_tensors="pt")
        for place in range(0, len(texts), 32)
    ]
    made = {}
    for form, units in (("fused, 25 %", "matrices"), ("fused int8, structured 25 %", "structured")):
        model, place = load_encoder(MINILM), folder / units
        config = DecompositionConfig(encoder_fraction=0.25, units=units)
        decompose_(model, config, batches, progress=False)
        if units == "structured":
            fuse_(model, dtype="int8", calibration=batches)
        save(model, tokenizer, place)
        for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes((Path(dense) / name).read_bytes())
        made[form] = str(place)
    return made


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--soak", type=float, default=10.0, help="seconds of the last one")
    parser.add_argument("--output", type=Path, default=suite_file("serving"))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.serve, options.folder)
        return
    start, dense = environment(), resolve_model(MINILM)
    with tempfile.TemporaryDirectory() as folder:
        forms = {RIVAL: dense, "fused": dense, **compressed(dense, Path(folder))}
        rows = []
        for form, place in forms.items():
            rows.append(measure(form, place, options.seconds, options.clients, options.soak))
            print(json.dumps(rows[-1]), flush=True)
    name = "_".join([start["cpu"].lower().replace(" ", "_"), *start["cpu_features"]])
    save_record(
        options.output,
        f"minilm-{name}",
        {
            "command": " ".join(["python -m benchmarks.serving", *argv]),
            "seconds": options.seconds,
            "soak_seconds": options.soak,
            "rows": rows,
            "environment": start,
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
