"""What each matrix is worth, measured: cut one matrix at a time and see how far the model's answers move.

The measured drop over the method's own loss at that rank is the weight that ``waterfill`` needs, with no gradient
and no assumption on how errors travel through the rest of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..config import DecompositionConfig
from ..errors import UserError
from ..io.json import read_json, write_json
from ..kinds import kind_of, model_inputs
from ..methods import factored_linear
from ..statistics import TEMPERATURE, Statistics, fingerprint
from .allocate import within_fraction
from .ranks import RankProblem

# Below this the drop is rounding noise; a weight of 0 would take every rank away.
SMALLEST_DROP = 1e-9


@torch.no_grad()
def answers(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """A model's answers (rows, numbers) to all ``batches``, on the CPU."""
    device, kind = next(model.parameters()).device, kind_of(model)
    found = []
    for batch in batches:
        inputs = model_inputs(batch, device)
        found.append(kind.answers(model(**inputs), inputs).float().cpu())
    return kind.joined(found)


def sensitivity_weights(
    model: PreTrainedModel,
    config: DecompositionConfig,
    statistics: Statistics | None,
    batches: list[dict[str, Tensor]],
    *,
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Measured weights for the allocation ``sensitivity``: each matrix alone is cut to the budget's uniform rank.

    Args:
        statistics: what the method needs.
        batches: padded inputs on which answers are compared, a few hundred examples.
        cache: a JSON file from which an interrupted measurement continues; replaced if model, data or method differ.

    Raises:
        UserError: an impossible size, statistics are needed, or ``cache`` is something else.
    """
    problem = RankProblem.of(model, config)
    base = within_fraction(problem.shapes, problem.fraction)
    ranks = {
        name: entry.rank or int(entry.break_even_rank) for name, entry in base.matrices.items()
    }

    def cut(name: str, rank: int) -> nn.Module:
        layer = problem.layer_statistics(name, statistics)
        return factored_linear(problem.modules[name], problem.method, layer, rank)

    return measure_sensitivity(
        model,
        batches,
        problem.spectra(statistics),
        ranks,
        cut,
        cache=cache,
        key=f"{fingerprint(model, batches)}-{config.method}-{kind_of(model).name}",
        progress=progress,
    )


def measure_sensitivity(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    spectra: dict[str, Tensor],
    ranks: dict[str, int],
    cut: Callable[[str, int], nn.Module],
    *,
    key: str = "",
    cache: str | Path | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """The weight of each matrix: answers' drop, when it alone is cut, over the method's loss at that rank.

    Args:
        model: dense; unchanged afterwards.
        batches: padded inputs, a few hundred examples.
        spectra: singular values as the method weighs them, not normalised.
        ranks: at which rank each matrix is cut, near what it will get.
        cut: the layer that stands in for a name at a rank.
        key: what the measurement depends on (model, data, method); another key in the cache is measured again.
        cache: a JSON file of drops, written after every matrix; those that it holds are not measured again.
    """
    was_training = model.training
    model.eval()
    known = read_json(cache) if cache is not None and Path(cache).is_file() else {}
    ours = isinstance(known, dict) and known.get("key") == key and known.get("ranks") == ranks
    drops = known.get("drops") if ours else {}
    if not isinstance(drops, dict) or not all(
        type(drop) in (int, float) and math.isfinite(drop) for drop in drops.values()
    ):
        raise UserError(f"{cache} is not a record of this measurement; delete it")
    reference = None
    for name in tqdm(ranks, desc="sensitivity", unit="matrix", disable=not progress, leave=False):
        if name in drops:
            continue
        reference = answers(model, batches) if reference is None else reference
        dense = model.get_submodule(name)
        try:
            model.set_submodule(name, cut(name, ranks[name]))
            moved = kind_of(model).compare(answers(model, batches), reference, TEMPERATURE)
            drops[name] = float(moved)
        finally:
            model.set_submodule(name, dense)
        if cache is not None:
            write_json(cache, {"key": key, "ranks": ranks, "drops": drops})
    model.train(was_training)
    losses = {
        name: float(spectra[name][rank:].double().square().sum()) for name, rank in ranks.items()
    }
    return {name: max(drops[name], SMALLEST_DROP) / max(losses[name], 1e-300) for name in ranks}
