"""Feature distillation: the dense teacher shows its low-rank copy what every part of each layer should compute.

Student and teacher have the same shape everywhere (Ben Noach and Goldberg, AACL 2020, section 3.2), so features are
compared directly, without projections. Each feature is one named term with a weight:

    loss = sum over terms of weight * mean over layers of  |f_student - f_teacher|^2 / Var(f_teacher)

The mean runs over real tokens only, and the division by the teacher feature's own variance puts all terms on one scale.
``logits`` is the temperature-scaled KL divergence of Hinton et al. (2015); ``task`` the model's own loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UserError
from .families import FAMILIES, encoder_layers
from .training import ResumableTrainer

# A feature is recorded as (layer index) -> tensor (batch, tokens, width); attention scores are made from query and key.
LINEAR_FEATURES = ("query", "key", "value", "attention_output", "ffn_intermediate", "ffn_output")
FEATURE_TERMS = (*LINEAR_FEATURES, "attention_scores", "context", "hidden")
TERMS = (*FEATURE_TERMS, "logits", "task")

PRESETS: dict[str, dict[str, float]] = {
    # Every feature the paper lists, equally weighted, and its two losses on the output.
    "paper": {"query": 1.0, "key": 1.0, "value": 1.0, "attention_scores": 1.0, "context": 1.0, "attention_output": 1.0,
              "ffn_intermediate": 1.0, "ffn_output": 1.0, "hidden": 1.0, "logits": 1.0, "task": 1.0},
    # What any architecture offers, and little more than the cost of two forward passes.
    "light": {"hidden": 1.0, "logits": 1.0, "task": 1.0},
}


@dataclass
class DistillationConfig:
    """Terms by name and weight, the temperature of the logits term, and whether the student keeps its dropout.

    Without dropout the student is compared with its teacher as both will be used; its noise would be most of the loss of
    a student that starts close to the teacher.

    Raises:
        UserError: an unknown term, a negative weight, no term at all, or a temperature that is not positive.
    """

    terms: dict[str, float] = field(default_factory=lambda: dict(PRESETS["paper"]))
    temperature: float = 1.0
    dropout: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.terms) - set(TERMS))
        if unknown:
            raise UserError(f"unknown distillation term {unknown[0]!r}; choose from {', '.join(TERMS)}")
        if any(not math.isfinite(weight) or weight < 0 for weight in self.terms.values()):
            raise UserError(f"distillation weights must be finite and not negative: {self.terms}")
        self.terms = {name: weight for name, weight in self.terms.items() if weight > 0}
        if not self.terms:
            raise UserError("no distillation term has a weight above zero; give at least one")
        if not self.temperature > 0:
            raise UserError(f"the temperature is {self.temperature}; give a number above zero")


class FeatureCapture:
    """Records the features that some terms need while a model runs; ``close`` removes its hooks.

    The output path is untouched: attention stays with whatever kernel the model uses, and only what the chosen terms
    need is kept.

    Raises:
        UserError: the architecture's features are not known and a term needs them.
    """

    def __init__(self, model: nn.Module, terms: set[str]):
        self.features: dict[str, dict[int, Tensor]] = {}
        self._handles: list[Any] = []
        wanted = terms & set(FEATURE_TERMS)
        layers = list(encoder_layers(model).values())
        family = FAMILIES.get(model.config.model_type)
        inner = wanted - {"hidden"}
        if inner and family is None:
            raise UserError(f"{model.config.model_type} offers only the terms hidden, logits and task "
                            f"(not {', '.join(sorted(inner))}); use --distillation_preset light")
        if wanted and not layers:
            raise UserError(f"{model.config.model_type} has no list of encoder layers; only the terms logits and task work")
        roles = inner & set(LINEAR_FEATURES)
        if "attention_scores" in inner:
            roles |= {"query", "key"}
        for index, layer in enumerate(layers):
            if "hidden" in wanted:
                self._on_output(layer, "hidden", index, _identity)
            for role in sorted(roles):
                part = _identity
                if role in ("query", "key", "value") and family.query == family.key:
                    part = _third(("query", "key", "value").index(role))
                self._on_output(layer.get_submodule(getattr(family, role)), role, index, part)
            if "context" in inner:
                self._on_input(layer.get_submodule(family.attention_output), "context", index)

    def _on_output(self, module: nn.Module, name: str, index: int, part: Callable[[Tensor], Tensor]) -> None:
        def record(_module: nn.Module, _inputs: tuple, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            self.features.setdefault(name, {})[index] = part(tensor)

        self._handles.append(module.register_forward_hook(record))

    def _on_input(self, module: nn.Module, name: str, index: int) -> None:
        def record(_module: nn.Module, inputs: tuple) -> None:
            self.features.setdefault(name, {})[index] = inputs[0]

        self._handles.append(module.register_forward_pre_hook(record))

    def take(self) -> dict[str, dict[int, Tensor]]:
        """Hand over what the last forward pass recorded, and forget it."""
        features, self.features = self.features, {}
        return features

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _third(which: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.chunk(3, dim=-1)[which]


def attention_scores(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Scaled scores (batch, heads, tokens, tokens) before mask and softmax, from (batch, tokens, width) projections.

    Position biases and rotations, which student and teacher share, are left out.
    """
    query, key = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))
    return query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])


def masked_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the entries where ``mask`` is 1, divided by the teacher's variance over the same entries.

    Args:
        student, teacher: any equal shape.
        mask: 0/1, broadcastable to that shape.
    """
    # where, not a product: what stands at padding may be infinite, and 0 * inf is NaN.
    keep = mask.bool()
    count = keep.sum() * (student.numel() // keep.numel())
    zero = teacher.new_zeros(())
    mean = torch.where(keep, teacher, zero).sum() / count
    variance = torch.where(keep, teacher - mean, zero).square().sum() / count
    return torch.where(keep, student - teacher, zero).square().sum() / count / variance.clamp_min(1e-12)


def feature_losses(student: dict[str, dict[int, Tensor]], teacher: dict[str, dict[int, Tensor]], attention_mask: Tensor,
                   heads: int, terms: set[str]) -> dict[str, Tensor]:
    """The unweighted value of each feature term: the mean over layers of its masked, normalised error."""
    token_mask = attention_mask[:, :, None]
    pair_mask = attention_mask[:, None, :, None] * attention_mask[:, None, None, :]
    losses = {}
    for name in sorted(terms & set(FEATURE_TERMS)):
        if name == "attention_scores":
            errors = [masked_error(attention_scores(student["query"][i], student["key"][i], heads),
                                   attention_scores(teacher["query"][i], teacher["key"][i], heads), pair_mask)
                      for i in teacher["query"]]
        else:
            errors = [masked_error(student[name][i], teacher[name][i], token_mask) for i in teacher[name]]
        losses[name] = torch.stack(errors).mean()
    return losses


def logits_loss(student: Tensor, teacher: Tensor, temperature: float, regression: bool) -> Tensor:
    """KL(teacher || student) at a temperature, times its square (Hinton et al., 2015); squared error for regression."""
    if regression:
        return F.mse_loss(student, teacher)
    return F.kl_div(F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1),
                    log_target=True, reduction="batchmean") * temperature**2


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Raise a UserError unless student and teacher have the same widths, depth and vocabulary."""
    for name in ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels"):
        of_student, of_teacher = (getattr(model.config, name, None) for model in (student, teacher))
        if of_student != of_teacher:
            raise UserError(f"student and teacher differ in {name}: {of_student} and {of_teacher}; "
                            "distil a model from the one it was factored from")


class DistillationTrainer(ResumableTrainer):
    """``transformers.Trainer`` whose loss is feature distillation from a frozen dense teacher.

    Every argument of ``Trainer`` works as usual. Batches without labels are allowed if no ``task`` term is asked for.

    Args:
        teacher: the dense model, of the same shape as ``model``. It is frozen and set to evaluation mode.
        distillation: the terms.

    Raises:
        UserError: teacher and student do not fit, or a term is not offered by the architecture.
    """

    def __init__(self, model: nn.Module, *args: Any, teacher: nn.Module, distillation: DistillationConfig, **kwargs: Any):
        check_pair(model, teacher)
        super().__init__(model, *args, **kwargs)
        # The loss below is a mean per batch, so Trainer itself must divide it among accumulated batches.
        self.model_accepts_loss_kwargs = False
        self.loss_is_scaled_for_ga = False
        self.distillation = distillation
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
        names = set(distillation.terms)
        self._dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
        if not distillation.dropout:
            for module, _ in self._dropouts:
                module.p = 0.0
        self._of_student, self._of_teacher = FeatureCapture(model, names), FeatureCapture(teacher, names)
        self._term_sums: dict[str, Tensor] = {}
        self._term_steps = 0

    def close(self) -> None:
        """Remove the hooks from both models and give the student back its dropout."""
        for module, probability in self._dropouts:
            module.p = probability
        self._of_student.close()
        self._of_teacher.close()

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **ignored: Any) -> Any:
        terms = self.distillation.terms
        outputs = model(**inputs)
        student = self._of_student.take()
        if not model.training:
            # Evaluation wants the model's own loss; the teacher need not run.
            loss = outputs.loss if outputs.loss is not None else outputs.logits.new_zeros(())
            return (loss, outputs) if return_outputs else loss
        values: dict[str, Tensor] = {}
        if set(terms) - {"task"}:
            with torch.no_grad():
                of_teacher = self.teacher(**{key: value for key, value in inputs.items() if key != "labels"})
            features = self._of_teacher.take()
            values = feature_losses(student, features, inputs["attention_mask"],
                                    self.teacher.config.num_attention_heads, set(terms))
            if "logits" in terms:
                values["logits"] = logits_loss(outputs.logits, of_teacher.logits, self.distillation.temperature,
                                               self.teacher.config.num_labels == 1)
        if "task" in terms:
            if outputs.loss is None:
                raise UserError("the term 'task' needs labelled examples; drop it or give labels")
            values["task"] = outputs.loss
        loss = sum(terms[name] * value for name, value in values.items())
        self._note_terms(values, loss)
        return (loss, outputs) if return_outputs else loss

    def _note_terms(self, values: dict[str, Tensor], loss: Tensor) -> None:
        if not torch.isfinite(loss):
            bad = next((name for name, value in values.items() if not torch.isfinite(value)), "the sum")
            raise UserError(f"the loss is not a number at step {self.state.global_step}, term {bad}; lower "
                            "--learning_rate (the last checkpoint is kept)")
        for name, value in values.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + value.detach()
        self._term_steps += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add each term's mean since the last log, unweighted, to what Trainer logs."""
        if "loss" in logs and self._term_steps:
            logs = {**logs, **{f"loss_{name}": total.item() / self._term_steps
                             for name, total in self._term_sums.items()}}
            self._term_sums, self._term_steps = {}, 0
        super().log(logs, *args, **kwargs)
