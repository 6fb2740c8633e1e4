"""The suite of ``benchmarks.operators``: every operator at the sizes of encoders, with the work that each must do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

OPERATORS = ("linear", "qkv", "ffn", "linear_norm")


@dataclass(frozen=True)
class Point:
    """One measurement: an operator at a size, forward or forward and backward."""

    operator: str
    rows: int
    inner: int
    outer: int
    hidden: int
    rank: int
    dtype: str
    backward: bool = False

    def flops(self) -> int:
        """Multiplications and additions of the low-rank form (a backward pass costs twice the forward)."""
        m, k, n, f, r = self.rows, self.inner, self.outer, self.hidden, self.rank
        pairs = {
            "linear": k + n,
            "linear_norm": k + n,
            "qkv": 3 * (k + n),
            "ffn": (k + f) + (f + n),
        }[self.operator]
        return 2 * m * r * pairs * (3 if self.backward else 1)

    def bytes(self) -> int:
        """Bytes that a fused forward must move at least: inputs, outputs and factors once."""
        m, k, n, f, r = self.rows, self.inner, self.outer, self.hidden, self.rank
        size = 4 if self.dtype == "float32" else 2
        factors = {
            "linear": r * (k + n),
            "linear_norm": r * (k + n),
            "qkv": 3 * r * (k + n),
            "ffn": r * (k + f) + r * (f + n),
        }[self.operator]
        rows = m * (k + n * {"qkv": 3, "linear_norm": 2}.get(self.operator, 1))
        return size * (rows + factors)


def points(gpu: bool, operators: list[str]) -> Iterator[Point]:
    """The suite, most telling points first, so that a run cut short by its time limit is still of use."""
    if not gpu:
        for rank in (245, 128, 64):
            for rows in (1024, 128, 16, 1):
                for operator, k, n, f in (
                    ("linear", 768, 768, 0),
                    ("linear", 768, 3072, 0),
                    ("linear", 3072, 768, 0),
                    ("qkv", 768, 768, 0),
                    ("ffn", 768, 768, 3072),
                    ("linear_norm", 768, 768, 0),
                ):
                    if operator in operators:
                        yield Point(operator, rows, k, n, f, rank, "float32")
        return
    for width, ranks, rows_list, backward in (
        (768, (256, 128), (4096, 16384, 65536, 512, 2048, 128, 16, 1), False),
        (768, (256, 128), (4096, 512, 16384), True),
        (768, (245, 64, 96, 192, 384, 32), (4096, 16384, 65536, 512, 2048, 128, 16, 1), False),
        (1024, (256, 128), (4096, 16384, 512, 1), False),
    ):
        for rank in ranks:
            for rows in rows_list:
                for operator, k, n, f in (
                    ("ffn", width, width, 4 * width),
                    ("qkv", width, width, 0),
                    ("linear", width, width, 0),
                    ("linear", width, 3 * width, 0),
                    ("linear", width, 4 * width, 0),
                    ("linear", 4 * width, width, 0),
                    ("linear_norm", width, width, 0),
                    ("linear_norm", 4 * width, width, 0),
                ):
                    if operator in operators:
                        yield Point(operator, rows, k, n, f, rank, "bfloat16", backward)
