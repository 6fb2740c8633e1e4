"""How often each token stands in the calibration text, and what the model makes of an error in its embedding."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..kinds import kind_of, model_inputs
from ..models.embedding import word_embedding
from .collect import fingerprint
from .gradients import TEMPERATURE, clipped_norms, frozen
from .store import EmbeddingStatistics


def collect_embedding(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    *,
    progress: bool = True,
    temperature: float = TEMPERATURE,
) -> EmbeddingStatistics:
    """Count the real tokens of ``batches`` and, by one backward pass from the model's own answers (see ``collect``),
    gather the second moment of the gradients that reach the word embedding.

    Args:
        batches: dicts with ``input_ids`` and ``attention_mask`` (batch, tokens); ``labels`` are ignored.
        temperature: of the model's own distribution, from which gradients are taken.

    Raises:
        UserError: the model has no dense word embedding.
    """
    _, embedding = word_embedding(model)
    device, kind = next(model.parameters()).device, kind_of(model)
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output.requires_grad_())
        return output

    energy, counts = 0.0, torch.zeros(embedding.num_embeddings, dtype=torch.float64)
    gradients = torch.zeros(embedding.embedding_dim, embedding.embedding_dim, dtype=torch.float64)
    handle = embedding.register_forward_hook(record)
    try:
        with frozen(model), torch.enable_grad():
            for index, batch in enumerate(
                tqdm(batches, desc="embedding", unit="batch", disable=not progress, leave=False)
            ):
                mask = batch["attention_mask"].bool()
                counts += batch["input_ids"][mask].bincount(minlength=len(counts)).double()
                inputs = model_inputs(batch, device)
                answers = kind.answers(model(**inputs), inputs).float()
                drawing = torch.Generator().manual_seed(index)
                loss = kind.sampled_loss(answers, temperature, drawing)
                gradient = torch.autograd.grad(loss, outputs.pop())[0]
                tokens = gradient[mask.to(device)].float()
                norms, clipped = clipped_norms(tokens)
                energy += float(norms.double().square().sum())
                tokens = tokens * (clipped / norms.clamp_min(1e-30))[:, None]
                gradients += (tokens.T @ tokens).double().cpu()
    finally:
        handle.remove()
    scale = energy / gradients.trace().clamp_min(1e-300) / counts.sum().clamp_min(1)
    return EmbeddingStatistics(counts, gradients * scale)


def stored_embedding(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], path: Path
) -> EmbeddingStatistics:
    """``collect_embedding``, or what an earlier run with the same model and data left at ``path``."""
    digest = fingerprint(model, batches)
    if not path.is_file():
        collect_embedding(model, batches).save(path, digest)
    return EmbeddingStatistics.load(path, digest)
