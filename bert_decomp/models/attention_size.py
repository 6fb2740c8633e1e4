"""How large the attention of a layer is. Without torch and transformers, for plans are data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSize:
    """The heads of a layer, by their numbers in the dense one, and the sizes of each."""

    heads: tuple[int, ...]
    score_size: int
    value_size: int

    def within(self, larger: AttentionSize) -> bool:
        """Whether ``larger`` has all of it; without heads their sizes say nothing."""
        return not self.heads or (
            set(self.heads) <= set(larger.heads)
            and self.score_size <= larger.score_size
            and self.value_size <= larger.value_size
        )
