"""``lowrank_ffn`` by the CUDA C++ kernel for sm_90a: clusters that split the neurons."""

from __future__ import annotations

from torch import Tensor

from . import launch


class FFNPlan:
    """``ffn`` with its factors in place: aligned, and described as the kernel takes them, once."""

    def __init__(
        self,
        down1: Tensor,
        up1: Tensor,
        bias1: Tensor | None,
        down2: Tensor,
        up2: Tensor,
        bias2: Tensor | None,
        activation: str,
    ) -> None:
        self.rank1, (self.outer, self.rank2) = up1.shape[1], up2.shape
        down1, up1 = launch.factors(down1, up1)
        down2, up2 = launch.factors(down2, up2)
        bias1, bias2 = launch.vector(bias1), launch.vector(bias2)
        # The kernel is given addresses: their tensors must live as long.
        self.kept = (down1, up1, bias1, down2, up2, bias2)
        self.padded1, self.padded2 = up1.shape[1], up2.shape[1]
        self.described = tuple(
            launch.address(tensor)
            if tensor is None or tensor.dim() == 1
            else launch.descriptor(tensor)
            for tensor in self.kept
        )
        self.numbers = (self.rank1, self.rank2, launch.DTYPES[up1.dtype])
        self.activation = launch.ACTIVATIONS[activation]

    def __call__(
        self, x: Tensor, save_hidden: bool = False, cluster: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        count = x.shape[0]
        y = x.new_empty(count, self.outer)
        p = x.new_empty(count, self.padded1) if save_hidden else None
        q = x.new_empty(count, self.padded2) if save_hidden else None
        if count:
            x = launch.aligned_rows(x)
            launch.run(
                "ffn",
                launch.descriptor(x),
                *self.described,
                launch.descriptor(y),
                launch.descriptor(p),
                launch.descriptor(q),
                *self.numbers,
                self.activation,
                *launch.stream_of(x),
                cluster,
            )
        if p is None or q is None:
            return y, None, None
        return y, p[:, : self.rank1].contiguous(), q[:, : self.rank2].contiguous()


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
    return FFNPlan(down1, up1, bias1, down2, up2, bias2, activation)(x, save_hidden, cluster)
