"""``lowrank_linear`` by the CUDA C++ kernels: sm_90a in clusters, sm_80 with mma.sync."""

from __future__ import annotations

from torch import Tensor

from .. import activations
from . import launch


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
    count, (outer, rank) = x.shape[0], up.shape
    y = x.new_empty(count, outer)
    if count == 0:
        return y, x.new_empty(0, rank) if save_hidden else None, y.clone() if save_pre else None
    x = launch.aligned_rows(x)
    down, up = launch.factors(down, up)
    bias = launch.vector(bias)
    hidden = x.new_empty(count, up.shape[1]) if save_hidden else None
    late = residual is not None or save_pre
    code = launch.ACTIVATIONS["none" if late else activation]
    launch.run(
        "linear",
        launch.descriptor(x),
        launch.descriptor(down),
        launch.descriptor(up),
        launch.address(bias),
        launch.descriptor(y),
        launch.descriptor(hidden),
        rank,
        launch.DTYPES[x.dtype],
        code,
        *launch.stream_of(x),
        rows,
        cluster,
        int(weights),
    )
    pre = y if residual is None else y.add_(residual)
    if late:
        y = activations.apply(activation, pre)
        y = y.clone() if save_pre and y is pre else y
    if hidden is not None and hidden.shape[1] != rank:
        hidden = hidden[:, :rank].contiguous()
    return y, hidden, pre if save_pre else None
