"""What every inference form shares: it remembers the module it stands for, and is saved and loaded as that one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UserError


class Replacement(nn.Module):
    """An inference form of ``source``, without gradients. Its state dict, to write and to read, is the source's own.

    Attributes:
        quality: what the form changes, in one that changes more than the rounding of sums (``int8.Quality``).
        from_file: whether a file had this form, and the source has no weights in floating point.
    """

    quality: Any = None
    from_file = False

    def __init__(self, source: nn.Module):
        super().__init__()
        # In a list, so that it is not a submodule: it is what unfuse_ puts back.
        self._source = [source]
        self._own_names: set[str] = set()
        self.register_load_state_dict_post_hook(_forget_own_names)
        super().train(False)

    @property
    def source(self) -> nn.Module:
        return self._source[0]

    def refresh(self) -> None:
        """Take the source's values again, after they were loaded or copied."""

    def release(self) -> None:
        """Give the source back what it shares with this form, for ``unfuse_``."""

    def stored(self) -> dict[str, nn.Module]:
        """What a file holds instead of modules of the source, by their names in it ("" is the source itself)."""
        return {}

    def train(self, mode: bool = True) -> Replacement:
        if mode:
            raise UserError("a fused model cannot be trained; unfuse_ it first")
        return super().train(False)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = self.source.state_dict(*args, prefix=prefix, **kwargs)
        # Views of packed weights become tensors of their own: files hold contiguous ones that share nothing.
        for name, value in state.items():
            if name.startswith(prefix) and isinstance(value, Tensor):
                whole = value.nbytes == value.untyped_storage().nbytes()
                state[name] = value.contiguous() if whole else value.clone()
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix)
        }
        try:
            result = self.source.load_state_dict(
                own, strict=False, assign=local_metadata.get("assign_to_params_buffers", False)
            )
        except RuntimeError as error:
            error_msgs.append(str(error))
            return
        missing_keys += [prefix + name for name in result.missing_keys]
        unexpected_keys += [prefix + name for name in result.unexpected_keys]
        # torch also visits this form's own submodules, whose names no file has.
        self._own_names = {
            prefix + name for name in nn.Module.state_dict(self) if name not in result.missing_keys
        }
        for module in self.modules():
            if isinstance(module, Replacement):
                module.refresh()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.refresh()


def _forget_own_names(module: Replacement, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [
        name for name in incompatible.missing_keys if name not in module._own_names
    ]
