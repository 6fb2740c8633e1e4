"""The word embedding as two factors: a table of codes (tokens, rank) and one projection up to the width.

In a compressed small encoder the word embedding is most of what is left. Its rows E_t are approximated under

    loss = sum_t f_t (E_t - E_hat_t) M (E_t - E_hat_t)^T,        E_hat_t = c_t up^T + mean

with f_t the smoothed frequency of token t in the calibration text and M = E[g g^T], g = dLoss/d(embedding), shrunk: what
the model makes of an error there. With mean = sum_t f_t E_t, C the rows' covariance under f and M = L L^T, the minimum is
up = L^-T U_r and c_t = (E_t - mean) L U_r, U_r the leading eigenvectors of L^T C L. It is the two-sided loss of
``methods`` with tokens in place of inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..errors import UserError
from ..io.atomic import atomic_file
from ..io.safetensors import open_tensors
from ..methods import balanced, shrunk
from ..planning import MatrixPlan, RankPlan
from ..statistics import TEMPERATURE, fingerprint, own_loss
from ..statistics.collect import frozen

# Occurrences that every token has beyond those counted: of unseen ones a tenth of one seen once.
SMOOTHING = 0.1
# Share of the mean diagonal that M is drawn to, as for the outputs of kfac.
SHRINKAGE = 0.3


class LowRankEmbedding(nn.Module):
    """y = codes[ids] up^T + bias: ids (...) integers -> (..., embedding_dim).

    ``codes`` (num_embeddings, rank), ``up`` (embedding_dim, rank), ``bias`` (embedding_dim,), all of one dtype. No gradient
    reaches the codes of ``padding_idx``.

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (
            ("num_embeddings", num_embeddings),
            ("embedding_dim", embedding_dim),
            ("rank", rank),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        self.num_embeddings, self.embedding_dim, self.rank, self.padding_idx = (
            num_embeddings,
            embedding_dim,
            rank,
            padding_idx,
        )
        self.codes = nn.Parameter(torch.empty(num_embeddings, rank, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(embedding_dim, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(embedding_dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose product has the variance 1 that nn.Embedding starts with."""
        nn.init.normal_(self.codes, std=self.rank**-0.25)
        nn.init.normal_(self.up, std=self.rank**-0.25)
        nn.init.zeros_(self.bias)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, self.codes, self.padding_idx), self.up, self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, padding_idx={self.padding_idx}, "
            f"parameters={sum(p.numel() for p in self.parameters())}"
        )


@dataclass
class EmbeddingStatistics:
    """``counts`` (tokens,) how often each token stands in the calibration text, ``gradients`` E[g g^T] (width, width) over
    its tokens, both float64."""

    counts: Tensor
    gradients: Tensor

    def save(self, path: str | Path, digest: str) -> None:
        """Write one safetensors file that names the model and data it is of."""
        with atomic_file(path) as temporary:
            save_file(vars(self), temporary, metadata={"fingerprint": digest})

    @classmethod
    def load(cls, path: str | Path, digest: str) -> EmbeddingStatistics:
        """Read what ``save`` wrote.

        Raises:
            UserError: it is damaged, or of another model or data.
        """
        with open_tensors(path) as file:
            about, tensors = (
                file.metadata() or {},
                {name: file.get_tensor(name) for name in file.keys()},
            )
        if (
            about.get("fingerprint") != digest
            or set(tensors) != {"counts", "gradients"}
            or not all(
                tensor.dtype == torch.float64 and bool(tensor.isfinite().all())
                for tensor in tensors.values()
            )
        ):
            raise UserError(
                f"{path} holds embedding statistics of another model or other data, or is damaged; delete it"
            )
        return cls(**tensors)


def word_embedding(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    """Qualified name and module of the dense word embedding.

    Raises:
        UserError: the model has none.
    """
    try:
        embedding = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embedding = None
    if type(embedding) is not nn.Embedding:
        raise UserError(
            f"{type(model).__name__} has no dense word embedding to factor; drop embedding_rank"
        )
    return next(name for name, module in model.named_modules() if module is embedding), embedding


def with_embedding(plan: RankPlan, model: PreTrainedModel, rank: int | None) -> RankPlan:
    """``plan`` with the word embedding cut to ``rank`` as well; None leaves the plan as it is.

    Raises:
        UserError: there is no word embedding, or the rank is below 1 or reaches break-even.
    """
    if rank is None:
        return plan
    name, embedding = word_embedding(model)
    entry = MatrixPlan(embedding.num_embeddings, embedding.embedding_dim, rank)
    most = math.ceil(entry.break_even_rank) - 1
    if not 1 <= rank <= most:
        raise UserError(
            f"embedding_rank {rank} does not compress the word embedding of {embedding.num_embeddings}x"
            f"{embedding.embedding_dim}; give 1 to {most}"
        )
    return RankPlan(plan.matrices, {name: entry})


def saved_by(model: PreTrainedModel, rank: int | None) -> int:
    """Parameters that an embedding of ``rank`` saves, its mean counted."""
    entries = with_embedding(RankPlan({}), model, rank).embeddings.values()
    return sum(
        entry.in_features * entry.out_features - entry.weights - entry.out_features
        for entry in entries
    )


def check_embeddings(model: PreTrainedModel, plan: RankPlan) -> None:
    """Raise UserError unless what ``plan`` says of embeddings is of the dense word embedding of ``model``."""
    for name, entry in plan.embeddings.items():
        found, embedding = word_embedding(model)
        if name != found or tuple(embedding.weight.shape) != (
            entry.in_features,
            entry.out_features,
        ):
            raise UserError(
                f"the plan's {name} ({entry.in_features}x{entry.out_features}) is not the word embedding of this "
                "model; make the plan anew"
            )
        if entry.rank is not None and entry.rank > min(entry.in_features, entry.out_features):
            raise UserError(
                f"the plan gives {name} rank {entry.rank}; full rank is {min(entry.in_features, entry.out_features)}"
            )


def collect_embedding(
    model: PreTrainedModel,
    batches: list[dict[str, Tensor]],
    *,
    progress: bool = True,
    temperature: float = TEMPERATURE,
) -> EmbeddingStatistics:
    """Count the real tokens of ``batches`` and, by one backward pass from the model's own answers (see ``statistics``),
    gather the second moment of the gradients that reach the word embedding."""
    _, embedding = word_embedding(model)
    device, outputs = next(model.parameters()).device, []

    def record(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        outputs.append(output.requires_grad_())
        return output

    counts = torch.zeros(embedding.num_embeddings, dtype=torch.float64)
    gradients = torch.zeros(embedding.embedding_dim, embedding.embedding_dim, dtype=torch.float64)
    handle = embedding.register_forward_hook(record)
    try:
        with frozen(model), torch.enable_grad():
            for index, batch in enumerate(
                tqdm(batches, desc="embedding", unit="batch", disable=not progress, leave=False)
            ):
                mask = batch["attention_mask"].bool()
                counts += batch["input_ids"][mask].bincount(minlength=len(counts)).double()
                inputs = {
                    name: value.to(device) for name, value in batch.items() if name != "labels"
                }
                loss = own_loss(
                    model(**inputs).logits.float(),
                    temperature,
                    torch.Generator().manual_seed(index),
                )
                g = torch.autograd.grad(loss, outputs.pop())[0][mask.to(device)].float()
                gradients += (g.T @ g).double().cpu()
    finally:
        handle.remove()
    return EmbeddingStatistics(counts, gradients / counts.sum().clamp_min(1))


def stored_embedding(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], path: Path
) -> EmbeddingStatistics:
    """``collect_embedding``, or what an earlier run with the same model and data left at ``path``."""
    digest = fingerprint(model, batches)
    if not path.is_file():
        collect_embedding(model, batches).save(path, digest)
    return EmbeddingStatistics.load(path, digest)


@torch.no_grad()
def factor_embedding(
    embedding: nn.Embedding, statistics: EmbeddingStatistics, rank: int
) -> LowRankEmbedding:
    """The best embedding of ``rank`` under the loss above, on the device and in the dtype of ``embedding``.

    Raises:
        UserError: the statistics are of another vocabulary or width.
    """
    shape = len(statistics.counts), len(statistics.gradients)
    if shape != tuple(embedding.weight.shape):
        raise UserError(
            f"the embedding's statistics are of {shape[0]}x{shape[1]} but it is {tuple(embedding.weight.shape)}; "
            "collect them again for this model"
        )
    weight = embedding.weight.double()
    frequency = (statistics.counts + SMOOTHING).to(weight.device)
    frequency = frequency / frequency.sum()
    mean = frequency @ weight
    rows = weight - mean
    covariance = (rows * frequency[:, None]).T @ rows
    factor = torch.linalg.cholesky(shrunk(statistics.gradients.to(weight.device), SHRINKAGE))
    leading = torch.linalg.eigh(factor.T @ covariance @ factor)[1].flip(1)[:, :rank]
    # Balanced over the tokens as they occur.
    codes = (rows * frequency.sqrt()[:, None]) @ (factor @ leading)
    codes, up = balanced(codes.T, torch.linalg.solve_triangular(factor.T, leading, upper=True))
    found = nn.utils.skip_init(
        LowRankEmbedding,
        *embedding.weight.shape,
        rank,
        embedding.padding_idx,
        device=embedding.weight.device,
        dtype=embedding.weight.dtype,
    )
    found.codes.copy_(codes.T / frequency.sqrt()[:, None])
    found.up.copy_(up)
    found.bias.copy_(mean)
    return found.train(embedding.training)
