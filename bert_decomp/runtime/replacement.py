"""What every inference form shares: it remembers the module that it stands for, and is saved as that module."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UserError


class Replacement(nn.Module):
    """An inference form of ``source``. It has no gradients, and the state dict is the source's own."""

    def __init__(self, source: nn.Module):
        super().__init__()
        # In a list, so that it is not a submodule: it is what unfuse_ puts back.
        self._source = [source]
        super().train(False)

    @property
    def source(self) -> nn.Module:
        return self._source[0]

    def release(self) -> None:
        """Give the source back what it shares with this form, for ``unfuse_``."""

    def train(self, mode: bool = True) -> Replacement:
        if mode:
            raise UserError("a fused model cannot be trained; unfuse_ it first")
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.source.state_dict(*args, **kwargs)
