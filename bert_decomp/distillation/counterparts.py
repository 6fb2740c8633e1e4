"""What of a teacher's features a student with fewer or smaller heads or fewer neurons should compute.

Such a student keeps coordinates of what its teacher computes: some heads, of each some combinations of its queries,
keys and values, and some neurons. These maps are read off the weights. A student's query, key or value layer reads the
same states as its teacher's, so for every head that it kept

    W' x + b'  ~  T (W x + b) + t,    T = W' W^+,    t = b' - T b

which is exact for a student as the decomposition makes it. The context is a mean of values, so it has the values' map.
Kept neurons are those whose weights are most alike, each taken once.

Raw attention scores have no counterpart: the student's keys lack a bias, which the softmax does not see but a
difference of scores does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from ..models.architectures import FAMILIES, Family, encoder_layers, submodule
from ..models.nested_resized import NestedResized
from ..models.resized import Removed, ResizedAttention, attention_name
from .features import Features

Map = Callable[[Tensor], Tensor]
# Features of what heads compute.
ATTENTION = ("query", "key", "value", "scores", "context")


class HeadMap:
    """From what every head of the teacher computes to the coordinates that a student has of some heads.

    Takes (..., heads * d), gives (..., kept heads * r), in float32.

    Args:
        student: weight (kept heads * r, width) and bias (kept heads * r,) of its layer, float64.
        teacher: likewise, (heads * d, width) and (heads * d,).
        kept: which heads the student has.
        size: d.
    """

    def __init__(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor],
        kept: list[int],
        size: int,
    ):
        weight, bias = (part.unflatten(0, (-1, size))[kept] for part in teacher)
        wanted, shift = (part.unflatten(0, (len(kept), -1)) for part in student)
        self._kept = kept
        self._weight = wanted @ torch.linalg.pinv(weight)
        self._shift = shift - (self._weight @ bias[..., None])[..., 0]
        self._weight, self._shift = self._weight.float(), self._shift.float()

    def __call__(self, x: Tensor) -> Tensor:
        heads = x.float().unflatten(-1, (-1, self._weight.shape[-1]))[..., self._kept, :]
        return (torch.einsum("...hd,hrd->...hr", heads, self._weight) + self._shift).flatten(-2)


class Counterparts:
    """The maps of one student, at the size in use.

    Args:
        student: a copy of ``teacher`` of which some layers have fewer or smaller heads or fewer neurons.
        teacher: dense, on the same device.
        features: those that are compared; only their maps are made.

    Attributes:
        absent: features by layer that the student has nothing of, because a sub-layer was dropped.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, features: set[str]):
        self.absent: set[tuple[str, int]] = set()
        self._maps: dict[tuple[str, int], Map] = {}
        family = FAMILIES.get(student.config.model_type)
        if family is None:
            return
        attention = (
            self._joint_attention if family.query == family.key else self._separate_attention
        )
        layers = zip(
            encoder_layers(student).values(), encoder_layers(teacher).values(), strict=True
        )
        size = teacher.config.hidden_size // teacher.config.num_attention_heads
        for index, (small, dense) in enumerate(layers):
            if features & set(ATTENTION):
                attention(index, small, dense, family, size)
            if "ffn_intermediate" in features:
                self._neurons(index, small, dense, family)

    def of(self, features: Features) -> CounterpartFeatures:
        """What the student should compute of the teacher's ``features``."""
        return CounterpartFeatures(features, self._maps)

    def _separate_attention(
        self, index: int, small: nn.Module, dense: nn.Module, family: Family, size: int
    ) -> None:
        attention = small.get_submodule(attention_name(family))
        if not isinstance(attention, ResizedAttention):
            return
        kept = list(attention.heads)
        if not kept:
            self.absent |= {(name, index) for name in ATTENTION}
            return
        for part in ("query", "key", "value"):
            student, teacher = map(affine, _both(small, dense, getattr(family, part)))
            self._maps[part, index] = HeadMap(student, teacher, kept, size)
        self._of_heads(index, kept)

    def _joint_attention(
        self, index: int, small: nn.Module, dense: nn.Module, family: Family, size: int
    ) -> None:
        """Of one matrix for query, key and value, which loses whole heads."""
        student, teacher = map(affine, _both(small, dense, family.query))
        if len(student[0]) == len(teacher[0]):
            return
        rows = [
            weight.unflatten(0, (3, -1, size)).transpose(0, 1) for weight, _ in (student, teacher)
        ]
        kept = most_alike(*(part.flatten(1) for part in rows)).tolist()
        for third, part in enumerate(("query", "key", "value")):
            own, dense_own = (
                (weight.chunk(3)[third], bias.chunk(3)[third])
                for weight, bias in (student, teacher)
            )
            self._maps[part, index] = HeadMap(own, dense_own, kept, size)
        self._of_heads(index, kept)

    def _of_heads(self, index: int, kept: list[int]) -> None:
        self._maps["context", index] = self._maps["value", index]
        self._maps["scores", index] = lambda scores: scores[:, kept]

    def _neurons(self, index: int, small: nn.Module, dense: nn.Module, family: Family) -> None:
        part, whole = _both(small, dense, family.ffn_intermediate)
        if _without_rows(part):
            self.absent.add(("ffn_intermediate", index))
            return
        (weight, _), (full, _) = affine(part), affine(whole)
        if len(weight) == len(full) and not isinstance(part, NestedResized):
            return
        # A gated feed-forward has two rows a neuron.
        neurons = submodule(dense, family.ffn_output, nn.Linear).in_features
        halves = len(full) // neurons
        kept = most_alike(
            *(rows.unflatten(0, (halves, -1)).transpose(0, 1).flatten(1) for rows in (weight, full))
        )
        columns = torch.cat([kept + half * neurons for half in range(halves)])
        self._maps["ffn_intermediate", index] = lambda x: x[..., columns]


class CounterpartFeatures:
    """A teacher's features as ``Counterparts`` map them; ``get`` is that of ``Features``."""

    def __init__(self, features: Features, maps: Mapping[tuple[str, int], Map]):
        self._features, self._maps = features, maps

    def get(self, name: str, layer: int) -> Tensor:
        feature = self._features.get(name, layer)
        mapped = self._maps.get((name, layer))
        return feature if mapped is None else mapped(feature)


@torch.no_grad()
def affine(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (out, in) and bias (out,) of a layer that computes x weight^T + bias from factors or in any other way,
    float64.

    >>> weight, bias = affine(nn.Linear(3, 2))
    >>> weight.shape, bias.shape
    (torch.Size([2, 3]), torch.Size([2]))
    """
    parameter = next(module.parameters())
    width = module.in_features
    assert isinstance(width, int)
    identity = torch.eye(width, device=parameter.device, dtype=parameter.dtype)
    bias = module(torch.zeros_like(identity[:1]))
    return (module(identity) - bias).T.double(), bias[0].double()


def most_alike(student: Tensor, teacher: Tensor) -> Tensor:
    """For each row of ``student`` (m, d) the row of ``teacher`` (n, d) in its direction, none twice: (m,) indices.

    >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> most_alike(torch.tensor([[0.1, 2.0], [3.0, 0.2]]), teacher).tolist()
    [1, 0]
    """
    likeness = normalize(student, dim=1) @ normalize(teacher, dim=1).T
    _, columns = linear_sum_assignment(likeness.cpu().numpy(), maximize=True)
    return torch.as_tensor(columns, device=student.device)


def _both(small: nn.Module, dense: nn.Module, name: str) -> tuple[nn.Module, nn.Module]:
    return small.get_submodule(name), dense.get_submodule(name)


def _without_rows(module: nn.Module) -> bool:
    """Whether a linear layer is gone, in the size in use."""
    if isinstance(module, NestedResized):
        return not len(module.sizes[module.fraction][0])
    return isinstance(module, Removed)
