"""What a fused call costs the host: Triton's launch is stubbed, everything before it is real.

    python -m benchmarks.host_path

Kernels are compiled for sm_90 (this needs no GPU) and "launched" by a driver that does nothing, on CPU tensors in
float16, in inference mode. Figures are microseconds a call, the best of repetitions; on a GPU the launch itself comes
on top. Two ``F.linear`` on the same tensors are timed for scale: on a CPU that includes the arithmetic. The record goes
to ``benchmarks/results/host-path.jsonl``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

import lowrank_kernels as lk
from bert_decomp.io.environment import environment
from lowrank_kernels import inference
from lowrank_kernels.triton_backend import device, support
from lowrank_kernels.triton_backend.tiles import Family

from .records import save_record, suite_file

WIDTH, NEURONS, RANK = 768, 3072, 256
ROWS = (32, 1024)


class StubDriver:
    """Passes for a Hopper: compiles for it, and counts launches instead of making them."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = self

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, index: int) -> int:
        return 0

    def get_device_properties(self, index: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *_: object) -> tuple:
        return object(), 1, 0, 0, 1024

    def unload_module(self, _: object) -> None:
        pass

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *_: object) -> None:
        self.launches += 1


def install() -> StubDriver:
    """Put the stub in the place of Triton's driver, and let the backend run on CPU tensors as on an H100."""
    from triton.runtime import driver

    stub = StubDriver()
    driver.set_active(stub)
    device.facts = lambda _: device.Facts(Family.HOPPER, 132)
    lk.register_backend(replace(support.TRITON, why_not_on=lambda _: None))
    return stub


def microseconds(call: Callable[[], object], seconds: float) -> float:
    """The least time of a call over repetitions of 200, after a first one that compiles."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        for _ in range(200):
            call()
        best = min(best, (time.perf_counter() - begin) / 200)
    return best * 1e6


def calls(rows: int) -> dict[str, Callable[[], object]]:
    """Each operator by its public function and prepared, and two library matmuls."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).half()

    x, residual = normal(rows, WIDTH), normal(rows, WIDTH)
    pair = (normal(RANK, WIDTH), normal(WIDTH, RANK), normal(WIDTH))
    three = tuple([part] * 3 for part in pair)
    norm = (normal(WIDTH), normal(WIDTH))
    ffn = (
        *(normal(RANK, WIDTH), normal(NEURONS, RANK), normal(NEURONS)),
        *(normal(RANK, NEURONS), normal(WIDTH, RANK), normal(WIDTH)),
    )
    linear, qkv = inference.prepare_linear(*pair), inference.prepare_qkv(*three)
    prepared_norm = inference.prepare_norm(*norm)
    feed_forward = inference.prepare_ffn(*ffn)
    return {
        "linear prepared": lambda: linear(x),
        "norm prepared": lambda: prepared_norm(x, residual),
        "qkv prepared": lambda: qkv(x),
        "ffn prepared": lambda: feed_forward(x),
        "linear public": lambda: lk.lowrank_linear(x, *pair),
        "linear_norm public": lambda: lk.lowrank_linear_norm(x, *pair, residual, *norm),
        "qkv public": lambda: lk.lowrank_qkv(x, *three),
        "ffn public": lambda: lk.lowrank_ffn(x, *ffn),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing for each call")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--output", default=suite_file("host-path"))
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("TRITON_INTERPRET=1 is set: there is no launch to stub; unset it", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    stub = install()
    result: dict[str, dict[str, float]] = {}
    with torch.inference_mode(), lk.use_backend("triton"):
        for rows in options.rows:
            for name, call in calls(rows).items():
                call()
                before = stub.launches
                call()
                launches = stub.launches - before
                if not launches:
                    raise RuntimeError(f"{name} made no launch")
                figure = microseconds(call, options.seconds)
                result[f"{name}, {rows} rows"] = {"us": round(figure, 1), "launches": launches}
                print(f"{name + f', {rows} rows':32} {figure:6.1f} us, {launches} launches")
        x, down, up = torch.randn(1, 16), torch.randn(8, 16), torch.randn(16, 8)
        figure = microseconds(lambda: F.linear(F.linear(x, down), up), options.seconds)
        result["two F.linear, 1x16"] = {"us": round(figure, 1), "launches": 0}
        print(f"{'two F.linear, 1x16':32} {figure:6.1f} us")
    made_with = environment()
    save_record(
        options.output,
        made_with["cpu"],
        {"environment": made_with, "options": {"rows": options.rows}, "calls": result},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
