"""The LM head as one value, and the vectors that cross between the passes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.tokens import capturing


@dataclass(frozen=True)
class HeadSpec:
    """A linear head and its logit transform: z = softcap * tanh(logit_scale * (h.W + b) / softcap) / temperature.

    weight: [V, H]. bias: [V] or None. logit_scale: float. softcap: float or None.
    temperature: float, or [N] one per row in the accumulation dtype.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float | Tensor = 1.0

    def row_temperature(self, rows: slice | Tensor) -> float | Tensor:
        return self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature

    def at_rows(self, rows: slice | Tensor) -> HeadSpec:
        return dataclasses.replace(self, temperature=self.row_temperature(rows))


@dataclass(frozen=True)
class Saved:
    """What the backward needs of the forward, each [N] in the accumulation dtype. logsumexp = max + log_sum.

    The two parts are kept apart: their sum would round away log_sum under a large common offset.
    """

    max: Tensor
    log_sum: Tensor
    logprobs: Tensor
    entropy: Tensor | None = None

    def at_rows(self, rows: slice | Tensor) -> Saved:
        entropy = None if self.entropy is None else self.entropy[rows]
        return Saved(self.max[rows], self.log_sum[rows], self.logprobs[rows], entropy)


@dataclass(frozen=True)
class Plan:
    """How much memory a call may take, and whether a row's bits may depend on its neighbours.

    workspace: bytes of logits that may exist at once. invariant: every GEMM has one fixed shape.
    shard: where this rank's words stand in a head that is cut over a process group (fastrl.ops.shard.Shard).
    """

    workspace: int
    invariant: bool = False
    shard: Any = None


@dataclass(frozen=True)
class Coefs:
    """dL/d(statistic) of each row, [N] in the accumulation dtype, or None where it is zero throughout."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None

    def present(self) -> list[Tensor]:
        return [x for x in (self.logprobs, self.entropy, self.logsumexp) if x is not None]

    def at_rows(self, rows: slice | Tensor) -> Coefs:
        return Coefs(*(None if x is None else x[rows] for x in (self.logprobs, self.entropy, self.logsumexp)))

    def nonzero_rows(self) -> Tensor:
        """[K] ascending indices of the rows with any coefficient other than zero (NaN counts as other).

        All of them while a CUDA graph is captured, when their number cannot be read.
        """
        first = self.present()[0]
        if capturing(first):
            return torch.arange(first.shape[0], device=first.device)
        keep = torch.stack([x != 0 for x in self.present()]).any(0)
        return keep.nonzero().squeeze(1)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def target_dlogit(coefs: Coefs, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    """[N] dL/dz at the target column. 1 - p_y is taken as -expm1(log p_y): exact for confident tokens.

    d logp/dz_y = 1 - p_y;  d lse/dz_y = p_y;  d H/dz_y = -p_y (log p_y + H).
    """
    p = logprobs.exp()
    out = torch.zeros_like(logprobs)
    if coefs.logprobs is not None:
        out = out - coefs.logprobs * torch.expm1(logprobs)
    if coefs.logsumexp is not None:
        out = out + coefs.logsumexp * p
    if coefs.entropy is not None:
        # p log p -> 0 as p -> 0: a target of probability zero has no pull on the entropy.
        term = torch.where(p > 0, p * (logprobs.clamp(min=torch.finfo(p.dtype).min) + entropy), torch.zeros_like(p))
        out = out - coefs.entropy * term
    return out
