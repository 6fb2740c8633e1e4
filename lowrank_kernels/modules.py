"""``LowRankLinear``: a drop-in for ``torch.nn.Linear`` that holds two factors instead of one matrix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, dispatch
from .operators.linear import lowrank_linear


class LowRankLinear(nn.Module):
    """y = (x down^T) up^T + bias, with ``down`` (rank, in_features) and ``up`` (out_features, rank).

    ``backend`` None leaves the choice to the dispatcher; "torch", "triton", ... force one.

    >>> layer = LowRankLinear.from_linear(nn.Linear(8, 12), rank=3)
    >>> layer(torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 12])
    >>> layer
    LowRankLinear(in_features=8, out_features=12, rank=3, bias=True, parameters=72)

    Args:
        device, dtype: of the parameters, as in ``torch.nn.Linear``.

    Raises:
        ValueError: rank or a size is below 1.
    """

    in_features: int
    out_features: int
    rank: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("in_features", in_features),
            ("out_features", out_features),
            ("rank", rank),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.backend: str | None = None
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        if self.down.device.type != "meta":
            # There torch takes a millisecond to draw what has no values.
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose product has the variance that nn.Linear starts with: 1 / (3 in_features)."""
        nn.init.uniform_(
            self.down, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features)
        )
        nn.init.uniform_(self.up, -math.sqrt(3 / self.rank), math.sqrt(3 / self.rank))
        if self.bias is not None:
            nn.init.uniform_(
                self.bias, -1 / math.sqrt(self.in_features), 1 / math.sqrt(self.in_features)
            )

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LowRankLinear:
        """A layer with copies of ``down`` (rank, in_features), ``up`` (out_features, rank) and ``bias`` (out_features).

        >>> LowRankLinear.from_factors(torch.ones(3, 8), torch.ones(12, 3))
        LowRankLinear(in_features=8, out_features=12, rank=3, bias=False, parameters=60)

        Args:
            device, dtype: of the copies; None for those of ``down``.

        Raises:
            ValueError: the shapes do not fit each other.
        """
        if (
            down.dim() != 2
            or up.dim() != 2
            or up.shape[1] != len(down)
            or (bias is not None and bias.shape != up.shape[:1])
        ):
            shapes = [None if value is None else tuple(value.shape) for value in (down, up, bias)]
            raise ValueError(f"down, up and bias of the shapes {shapes} do not fit each other")
        layer = nn.utils.skip_init(
            cls,
            down.shape[1],
            len(up),
            len(down),
            bias is not None,
            device=down.device if device is None else device,
            dtype=down.dtype if dtype is None else dtype,
        )
        layer.down.copy_(down)
        layer.up.copy_(up)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int) -> LowRankLinear:
        """Factor a dense layer by truncated SVD, balanced: down = sqrt(s_r) V_r^T, up = U_r sqrt(s_r).

        The new layer has the dense one's device, dtype, bias, training flag and requires_grad.

        Raises:
            ValueError: ``rank`` is outside 1..min(in_features, out_features).
        """
        weight = linear.weight
        if not 1 <= rank <= min(weight.shape):
            raise ValueError(
                f"rank is {rank}; a {tuple(weight.shape)} weight needs 1 to {min(weight.shape)}"
            )
        exact = weight if weight.dtype == torch.float64 else weight.float()
        u, s, vt = torch.linalg.svd(exact, full_matrices=False)
        root = s[:rank].sqrt()
        down, up = root[:, None] * vt[:rank], u[:, :rank] * root
        layer = cls.from_factors(down, up, linear.bias, dtype=weight.dtype)
        layer.down.requires_grad_(weight.requires_grad)
        layer.up.requires_grad_(weight.requires_grad)
        if linear.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        if dispatch.route(x, self.backend) == "torch":
            # The parameters fit each other by construction; only x can be wrong, and checking it costs host time that
            # shows at batch 1. So the matmuls run first and the check explains a failure.
            try:
                return F.linear(F.linear(x, self.down), self.up, self.bias)
            except RuntimeError:
                checks.factors(x, self.down, self.up, self.bias)
                raise
        # No packed factors are kept here: a change through ``.data``, or parameters put in for one call, would go
        # unseen.
        return lowrank_linear(x, self.down, self.up, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        parameters = sum(p.numel() for p in self.parameters())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, parameters={parameters}"
        )
