"""``lowrank_ffn`` by the CUDA C++ kernel for sm_90a: clusters that split the neurons."""

from __future__ import annotations

from torch import Tensor

from . import launch


def ffn(
    x: Tensor,
    down1: Tensor,
    up1: Tensor,
    bias1: Tensor | None,
    down2: Tensor,
    up2: Tensor,
    bias2: Tensor | None,
    activation: str,
    save_hidden: bool = False,
    cluster: int = 0,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The backend form of ``lowrank_ffn`` on x (rows, in); see ``lowrank_kernels.reference.ffn``.

    ``cluster`` (1, 2, 4, 8) is the number of CTAs that share the neurons; left out, it follows from the number of rows.

    Raises:
        ValueError: no kernel has that cluster for these ranks.
    """
    count, rank1, (outer, rank2) = x.shape[0], up1.shape[1], up2.shape
    y = x.new_empty(count, outer)
    if count == 0:
        return (y, x.new_empty(0, rank1), x.new_empty(0, rank2)) if save_hidden else (y, None, None)
    x = launch.aligned_rows(x)
    down1, up1 = launch.factors(down1, up1)
    down2, up2 = launch.factors(down2, up2)
    bias1, bias2 = launch.vector(bias1), launch.vector(bias2)
    p = x.new_empty(count, up1.shape[1]) if save_hidden else None
    q = x.new_empty(count, up2.shape[1]) if save_hidden else None
    launch.run(
        "ffn",
        launch.descriptor(x),
        launch.descriptor(down1),
        launch.descriptor(up1),
        launch.address(bias1),
        launch.descriptor(down2),
        launch.descriptor(up2),
        launch.address(bias2),
        launch.descriptor(y),
        launch.descriptor(p),
        launch.descriptor(q),
        rank1,
        rank2,
        launch.DTYPES[x.dtype],
        launch.ACTIVATIONS[activation],
        *launch.stream_of(x),
        cluster,
    )
    if p is None or q is None:
        return y, None, None
    return y, p[:, :rank1].contiguous(), q[:, :rank2].contiguous()
