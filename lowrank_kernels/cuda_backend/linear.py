"""``lowrank_linear`` by the CUDA C++ kernels: sm_90a in clusters, sm_80 with mma.sync."""

from __future__ import annotations

from torch import Tensor

from .. import activations
from . import launch


class LinearPlan:
    """``linear`` with its factors in place: aligned, and described as the kernel takes them, once."""

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None, activation: str) -> None:
        self.outer, self.rank = up.shape
        down, up = launch.factors(down, up)
        bias = launch.vector(bias)
        # The kernel is given addresses: their tensors must live as long.
        self.kept, self.padded = (down, up, bias), up.shape[1]
        self.described = (launch.descriptor(down), launch.descriptor(up), launch.address(bias))
        self.activation, self.dtype = activation, launch.DTYPES[up.dtype]

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        save_hidden: bool = False,
        save_pre: bool = False,
        rows: int = 0,
        cluster: int = 0,
        weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        count = x.shape[0]
        y = x.new_empty(count, self.outer)
        hidden = x.new_empty(count, self.padded) if save_hidden else None
        late = residual is not None or save_pre
        if count:
            x = launch.aligned_rows(x)
            launch.run(
                "linear",
                launch.descriptor(x),
                *self.described,
                launch.descriptor(y),
                launch.descriptor(hidden),
                self.rank,
                self.dtype,
                launch.ACTIVATIONS["none" if late else self.activation],
                *launch.stream_of(x),
                rows,
                cluster,
                int(weights),
            )
        if hidden is not None and self.padded != self.rank:
            hidden = hidden[:, : self.rank].contiguous()
        if not late:
            return y, hidden, None
        pre = y if residual is None else y.add_(residual)
        y = activations.apply(self.activation, pre)
        y = y.clone() if save_pre and y is pre else y
        return y, hidden, pre if save_pre else None


def linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None = None,
    save_hidden: bool = False,
    save_pre: bool = False,
    rows: int = 0,
    cluster: int = 0,
    weights: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backend form of ``lowrank_linear`` on x (rows, in); see ``lowrank_kernels.reference.linear``.

    ``rows`` (64 or 128), ``cluster`` (1, 2, 4, 8) and ``weights`` (the cluster shares the factors, not the rows) choose
    the Hopper kernel's shape; left out, it chooses by the number of rows. The kernel adds the bias and applies the
    activation; a residual and the sum before the activation are torch's.

    Raises:
        ValueError: no kernel has that shape for this rank.
    """
    plan = LinearPlan(down, up, bias, activation)
    return plan(x, residual, save_hidden, save_pre, rows, cluster, weights)
