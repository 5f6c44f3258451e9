"""AdamW's groups, the learning rate as a function of the step, and the guarded step: clip, check, update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrl.train.config import TrainConfig


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a gradient that is NaN or infinite."""


# -- AdamW -------------------------------------------------------------------------------------------------------
def decay_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay shrinks: matrices that belong to no norm layer."""
    norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    return {n for n, p in model.named_parameters() if p.dim() >= 2 and n not in norms and not n.endswith("bias")}


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model` in two groups, with and without weight decay.

    Raises: ValueError if nothing is trainable.
    """
    decayed = decay_names(model)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient; unfreeze what should be trained")
    groups = [
        {"params": [p for n, p in trainable if n in decayed], "weight_decay": config.weight_decay},
        {"params": [p for n, p in trainable if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=all(p.device.type == "cuda" for _, p in trainable) or None,
    )


# -- learning rate -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step; a pure function, so a resumed run cannot replay its warmup. As transformers'."""

    kind: str
    peak: float
    warmup: int
    total: int

    @classmethod
    def from_config(cls, config: TrainConfig, total_steps: int) -> Schedule:
        warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * total_steps
        if config.warmup_ratio:
            warmup = config.warmup_ratio * total_steps
        return cls(config.lr_scheduler_type, config.learning_rate, math.ceil(warmup), total_steps)

    def lr(self, step: int) -> float:
        """The rate of the update made when `step` updates are done (0, 1, ...)."""
        if step < self.warmup:
            return self.peak * step / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        if self.kind == "linear":
            return self.peak * (1.0 - progress)
        if self.kind == "cosine":
            return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.peak


# -- the step ----------------------------------------------------------------------------------------------------
def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """sqrt(sum of squares) over all entries, 0-dim, accumulated in float32 (float64 for float64 gradients)."""
    norms = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for g in gradients]
    if not norms:
        return torch.zeros(())
    device = norms[0].device
    return torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))


def clip_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale in place by min(1, max_norm / (norm + 1e-6)); max_norm 0 leaves them. No host sync."""
    if max_norm > 0:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(scale.to(g.device))


@dataclass
class StepOutcome:
    """grad_norm: before clipping. culprits: parameters with a non-finite gradient when the step was skipped."""

    grad_norm: float
    skipped: bool
    culprits: list[str]


@dataclass
class StepGuard:
    """optimizer.step() behind a check: with a NaN or infinite gradient nothing moves, weights and moments bitwise.

    skipped: steps skipped in all. in_a_row: since the last good one; at `max_skipped_steps` NonFiniteError is raised.
    """

    optimizer: torch.optim.Optimizer
    named_parameters: list[tuple[str, nn.Parameter]]
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 3
    skipped: int = 0
    in_a_row: int = 0

    def __post_init__(self):
        self.named_parameters = list(self.named_parameters)

    @property
    def lr(self) -> float:
        """The learning rate of the last update."""
        return self.optimizer.param_groups[0]["lr"]

    def step(self, lr: float | None = None) -> StepOutcome:
        """Set the rate, clip, update, drop the gradients. One host sync (the norm)."""
        gradients = [p.grad for _, p in self.named_parameters if p.grad is not None]
        norm = global_norm(gradients)
        value = norm.item()
        if not math.isfinite(value):
            return self._skip(value)
        clip_gradients(gradients, norm, self.max_grad_norm)
        for group in self.optimizer.param_groups if lr is not None else ():
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.in_a_row = 0
        return StepOutcome(value, False, [])

    def _skip(self, norm: float) -> StepOutcome:
        bad = [n for n, p in self.named_parameters if p.grad is not None and not p.grad.isfinite().all()]
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.max_skipped_steps:
            raise NonFiniteError(
                f"{self.in_a_row} steps in a row had a gradient norm of {norm}; non-finite in {len(bad)} parameters: "
                f"{', '.join(bad[:5]) or 'none, the sum of squares overflows'}. Weights and optimizer are as before "
                "the first of them; lower --learning_rate, or look at the data with --debug_checks true"
            )
        return StepOutcome(norm, True, bad)
