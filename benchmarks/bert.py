"""Time encoders end to end: dense and low-rank, in several forms, eager, compiled and in CUDA graphs.

The forms: dense, dense in the fused runtime, unfused low-rank, fused per linear, fused runtime.

    python -m benchmarks.bert [--device cpu] [--threads 1] [--minutes 7]

Weights are random, which changes no time. Shapes are BERT-base's and all-MiniLM-L6-v2's; sizes are rank 245 everywhere
(at MiniLM's width the rank that keeps the same share) and a plan of mixed ranks at a quarter of the encoder. The plan
is the planner's for a real MiniLM classifier (``PLAN``), in multiples of 8; for BERT-base each of its layers comes
twice, with twice the rank. Forms take turns in one process. What the time limit leaves out is named in the result file,
never estimated.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_decomp.cli.command import command
from bert_decomp.errors import UserError
from bert_decomp.evaluation.latency import peak_memory, take_turns
from bert_decomp.evaluation.profiling import time_split
from bert_decomp.io.environment import environment
from lowrank_kernels import dispatch
from lowrank_kernels.env import cpu_name

from .encoders import PLAN, SHAPES, build, inputs_of
from .records import save_record, suite_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Points are batch x length, or batch x mix; at those of ``compiled`` models are compiled as well.
GRIDS = {
    "cpu": {
        "bert-base": ["1x32", "8x128", "32xmix"],
        "minilm": ["1x32", "8x128", "32xmix"],
        "compiled": ["8x128"],
    },
    "cuda": {
        **{
            shape: [
                f"{batch}x{length}"
                for length in (128, "mix", 32, 512)
                for batch in (32, 1, 8, 128, 512)
            ]
            for shape in SHAPES
        },
        "compiled": ["1x32", "32x128"],
    },
}
MODES = {"cpu": ("eager", "compiled"), "cuda": ("eager", "compiled", "CUDA graph")}


def graphed(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], object]:
    """A forward pass as a replayed CUDA graph on fixed inputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), dispatch.as_captured():
        for _ in range(3):
            model(**inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(**inputs)
    return graph.replay


def prepare(
    model: nn.Module, mode: str, inputs: dict[str, Tensor], compile_mode: str
) -> tuple[Callable[[], object], float | None]:
    """A call of the model in that mode, and the seconds that compiling took."""
    if mode == "eager":
        return partial(model, **inputs), None
    start = time.perf_counter()
    if mode == "CUDA graph":
        return graphed(model, inputs), None
    torch.compiler.reset()
    call = partial(torch.compile(model, mode=compile_mode, dynamic=False), **inputs)
    call()
    return call, time.perf_counter() - start


def joules(call: Callable[[], object], repeats: int = 20) -> float | None:
    """Energy of one call by the device's own counter, or None where it has none."""
    if not torch.cuda.is_available():
        return None
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        torch.cuda.synchronize()
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1e3 / repeats
    except Exception:  # not installed, or not supported by the device: the field stays empty
        return None


@torch.inference_mode()
def measure_point(
    models: dict[tuple[str, str], nn.Module],
    twins: dict[tuple[str, str], nn.Module],
    point: str,
    modes: list[str],
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for each model and mode at one point, and what could not be run there, with the reason."""
    device, (inputs, tokens) = (
        options.device,
        inputs_of(point, next(iter(models.values())).config.vocab_size, options.device),
    )
    calls, compile_seconds, failed = {}, {}, []
    for (key, model), mode in itertools.product(models.items(), modes):
        # On a CPU compiling takes a minute a form: the strongest dense rival and the runtime.
        if mode == "compiled" and device == "cpu" and key[1] not in ("dense", "fused runtime"):
            continue
        try:
            source = model if mode == "eager" else twins.get(key, model)
            calls[(*key, mode)], compile_seconds[(*key, mode)] = prepare(
                source, mode, inputs, options.compile_mode
            )
        except (
            Exception
        ) as error:  # out of memory, a compiler's refusal, a graph that cannot be captured
            failed.append(
                f"{point}, {', '.join(key)}, {mode}: {(str(error).splitlines() or [type(error).__name__])[0][:160]}"
            )
    times = take_turns(calls, options.seconds, cuda=device == "cuda", least=options.least, warm=1)
    medians = {key: float(np.median(values)) for key, values in times.items()}
    dense = [median for key, median in medians.items() if key[:2] == ("dense", "dense")]
    rows = []
    for (size, form, mode), values in times.items():
        median, batch = medians[size, form, mode], len(inputs["input_ids"])
        eager = mode == "eager"
        rows.append(
            {
                "size": size,
                "form": form,
                "mode": mode,
                "point": point,
                "batch_size": batch,
                "calls": len(values),
                "real_tokens": tokens,
                "padded_tokens": inputs["input_ids"].numel(),
                "latency_ms": median * 1e3,
                "latency_ms_q20": float(np.quantile(values, 0.2)) * 1e3,
                "latency_ms_q80": float(np.quantile(values, 0.8)) * 1e3,
                "latency_ms_p95": float(np.quantile(values, 0.95)) * 1e3,
                "tokens_per_second": tokens / median,
                "sentences_per_second": batch / median,
                "over_dense_eager": medians["dense", "dense", "eager"] / median,
                "over_strongest_dense": min(dense) / median,
                "compile_seconds": compile_seconds[size, form, mode],
                "peak_activation_mb": peak_memory(models[size, form], inputs) / 1e6
                if eager
                else None,
                "joules": joules(calls[size, form, mode]),
                "time_split": time_split(models[size, form], inputs, passes=1) if eager else None,
            }
        )
    return rows, failed


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=sorted(GRIDS), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--dtypes", nargs="+", choices=sorted(DTYPES), help="default: fp32, on a GPU bf16 and fp32"
    )
    parser.add_argument(
        "--points", nargs="+", help="such as 8x128 32xmix (default: the device's grid)"
    )
    parser.add_argument("--compiled", nargs="*", help="points at which models are compiled as well")
    parser.add_argument(
        "--compile_mode",
        help="torch.compile's mode (default: default, on a GPU max-autotune-no-cudagraphs)",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each form and point")
    parser.add_argument(
        "--least", type=int, default=5, help="calls of each form and point at least"
    )
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="no new point is begun after this"
    )
    parser.add_argument("--output", type=Path, default=suite_file("bert"))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU; use --device cpu")
    torch.set_num_threads(options.threads)
    grid, cuda = GRIDS[options.device], options.device == "cuda"
    options.dtypes = options.dtypes or (["bf16", "fp32"] if cuda else ["fp32"])
    options.compile_mode = options.compile_mode or (
        "max-autotune-no-cudagraphs" if cuda else "default"
    )
    compiled = grid["compiled"] if options.compiled is None else options.compiled
    name = (
        (torch.cuda.get_device_name() if cuda else f"{cpu_name()} {options.threads}t")
        .lower()
        .replace(" ", "_")
    )
    start, rows, left_out, failed, limits = time.perf_counter(), [], [], [], {}
    for dtype, shape in itertools.product(options.dtypes, options.shapes):
        models, twins, limits[shape] = build(shape, DTYPES[dtype], options.device)
        for point in options.points or grid[shape]:
            if time.perf_counter() - start > 60 * options.minutes:
                left_out.append(f"{shape} {dtype} {point}")
                continue
            modes = [
                mode for mode in MODES[options.device] if mode != "compiled" or point in compiled
            ]
            found, errors = measure_point(models, twins, point, modes, options)
            rows += [{"shape": shape, "dtype": dtype, **row} for row in found]
            failed += [f"{shape} {dtype} {error}" for error in errors]
            for row in found:
                print(
                    f"{shape:>9} {dtype} {point:>7} {row['size']:>17} {row['form']:>16} {row['mode']:>10}: "
                    f"{row['latency_ms']:8.1f} ms  {row['over_dense_eager']:.2f}x",
                    flush=True,
                )
        del models, twins
        gc.collect()
    save_record(
        options.output,
        name,
        {
            "command": " ".join(["python -m benchmarks.bert", *argv]),
            "environment": environment(),
            "device": torch.cuda.get_device_name() if cuda else cpu_name(),
            "threads": options.threads,
            "limits": limits,
            "plan": PLAN,
            "seconds": time.perf_counter() - start,
            "left_out": left_out,
            "failed": failed,
            "rows": rows,
        },
    )
    print(options.output)


if __name__ == "__main__":
    sys.exit(command(main))
