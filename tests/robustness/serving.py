"""Serving load: ``python -m tests.robustness.serving``.

It puts a compressed, fused classifier behind transformers' pipeline and lets client threads
call it at once for minutes.

Every answer must equal, to the bit, the answer that the same request got when nothing else was running; memory is
sampled throughout. Latencies are written down as a record of the load (threads share the cores), not as a measure of
speed.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, pipeline

from benchmarks.records import save_record, suite_file
from bert_decomp import DecompositionConfig, collect_statistics, decompose_, select_linears
from bert_decomp.data.batches import batches, encode
from bert_decomp.data.demo import MINILM
from bert_decomp.data.task import load_task
from bert_decomp.io.environment import environment
from bert_decomp.models.loading import load_model, load_tokenizer
from bert_decomp.runtime import fuse_
from lowrank_kernels import LowRankLinear


def compressed(
    name_or_path: str, share: float, length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in its inference form; a dense one is factored by ``kfac`` to ``share`` of its encoder first."""
    task, tokenizer = load_task("questions"), load_tokenizer(name_or_path)
    names = dict(enumerate(task.label_names))
    torch.manual_seed(0)
    # A bare encoder gets a head of six classes; what it answers does not matter, only that it does not change.
    model = load_model(
        name_or_path, num_labels=6, id2label=names, label2id={n: i for i, n in names.items()}
    ).eval()
    if not any(isinstance(module, LowRankLinear) for module in model.modules()):
        calibration = batches(
            encode(task.train.select(range(512)), tokenizer, length), tokenizer, 64
        )
        config = DecompositionConfig(method="kfac", encoder_fraction=share)
        decompose_(
            model,
            config,
            statistics=collect_statistics(
                model, calibration, select_linears(model), needs=config.needs
            ),
        )
    return fuse_(model), tokenizer


def requests_of(texts: list[str], count: int, seed: int, longest: int = 24) -> list[list[str]]:
    """Requests of mixed lengths: three of four are one text of up to ``longest`` sentences, others batches of 2-8."""
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choice(texts) for _ in range(round(longest ** draw.random())))

    return [
        [text() for _ in range(1 if draw.random() < 0.75 else draw.randint(2, 8))]
        for _ in range(count)
    ]


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[list[str]],
    *,
    threads: int,
    seconds: float,
    length: int,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """One pipeline for all ``threads``: each calls it with requests in its own random order until the time is over.

    Returns:
        counts, first failures, latency quantiles in ms and memory in MB (the first fifth of the time is warm-up).
    """
    classify = pipeline(
        "text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None
    )

    def answer(request: list[str]) -> Any:
        return classify(request, batch_size=len(request), truncation=True, max_length=length)

    expected = [answer(request) for request in requests]
    process, lock, stop = psutil.Process(), threading.Lock(), threading.Event()
    latencies: list[float] = []
    failures: list[str] = []
    counts = {"requests": 0, "texts": 0, "errors": 0, "different": 0}

    def client(number: int) -> None:
        draw = random.Random(seed * 1000 + number)
        while not stop.is_set():
            index = draw.randrange(len(requests))
            start, what = time.perf_counter(), None
            try:
                found = answer(requests[index])
                if found != expected[index]:
                    what, kind = (
                        f"request {index}: {found} instead of {expected[index]}",
                        "different",
                    )
            except Exception as error:
                what, kind = f"request {index}: {type(error).__name__}: {error}", "errors"
            spent = time.perf_counter() - start
            with lock:
                latencies.append(spent)
                counts["requests"] += 1
                counts["texts"] += len(requests[index])
                if what:
                    counts[kind] += 1
                    failures[5:] = []
                    failures.append(what[:400])

    clients = [
        threading.Thread(target=client, args=(number,), daemon=True) for number in range(threads)
    ]
    began = time.perf_counter()
    for each in clients:
        each.start()
    samples = [(0.0, process.memory_info().rss / 1e6)]
    with tqdm(total=round(seconds), unit="s", disable=not progress) as bar:
        while samples[-1][0] < seconds:
            time.sleep(min(1.0, seconds / 20))
            samples.append((time.perf_counter() - began, process.memory_info().rss / 1e6))
            bar.n = min(round(samples[-1][0]), bar.total)
            bar.set_postfix(
                requests=counts["requests"], failed=counts["errors"] + counts["different"]
            )
    stop.set()
    for each in clients:
        each.join()
    warm = np.array([sample for sample in samples if sample[0] > seconds / 5])
    return {
        **counts,
        "failures": failures,
        "distinct_requests": len(requests),
        "seconds": round(samples[-1][0], 1),
        "latency_ms": {
            f"q{q}": round(1e3 * float(np.quantile(latencies, q / 100)), 1) for q in (50, 95, 99)
        },
        "memory_mb": {
            "at_the_end": round(samples[-1][1], 1),
            "highest_minus_lowest": round(float(np.ptp(warm[:, 1])), 2),
            "slope_a_minute": round(60 * float(np.polyfit(*warm.T, 1)[0]), 3)
            if len(warm) > 1
            else 0.0,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=MINILM,
        help="model folder (low-rank, or dense: then factored here) or encoder",
    )
    parser.add_argument(
        "--encoder_fraction",
        type=float,
        default=0.25,
        help="share of the encoder kept if it is factored here",
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--requests", type=int, default=400, help="distinct requests")
    parser.add_argument("--length", type=int, default=256, help="longest input in tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=suite_file("robustness"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"seed {options.seed}")
    model, tokenizer = compressed(options.model, options.encoder_fraction, options.length)
    requests = requests_of(
        load_task("questions").validation["text"][:], options.requests, options.seed
    )
    found = serve(
        model,
        tokenizer,
        requests,
        threads=options.threads,
        seconds=60 * options.minutes,
        length=options.length,
        seed=options.seed,
    )
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    save_record(
        options.output,
        "serving",
        {
            "options": {**asked, "model": Path(options.model).name},
            **found,
            "environment": environment(),
        },
    )
    print(found)
    raise SystemExit(bool(found["errors"] or found["different"]))


if __name__ == "__main__":
    main()
