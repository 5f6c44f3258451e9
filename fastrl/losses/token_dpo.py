"""Token-level DPO: log-ratios of a pair and the sequential KL from the reference, over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastrl.losses.margin import NOT_NEGATIVE, RatioPairLoss, interleaved, pairs
from fastrl.losses.pairwise import Ranged
from fastrl.objective import Divergence
from fastrl.tokens import TokenBatch, TokenStats, segment_sum


@dataclass(frozen=True)
class TDPO(Ranged, RatioPairLoss):
    """TDPO (Zeng et al. 2024): DPO whose margin also weighs how far each answer's contexts are from the reference.

    D = sum_t KL(ref || pi) at the answer's tokens, over the vocabulary: the reference is the teacher of the call,
    fused_loss(..., teacher=fastrl.Teacher(ref_hidden, ref_weight)), beside batch.ref_logprobs. version=1 takes
    alpha = 1 and both gradients; version=2 weighs by alpha and holds the chosen's D constant.
    """

    paper: ClassVar[str] = "Zeng et al. 2024, arXiv:2404.11999, eq. 14 and 17"
    formula: ClassVar[str] = "-log sigma(beta (r_w - r_l - alpha (D_l - stop(D_w)))), D = sum_t KL(ref || pi)"
    divergence: ClassVar[Divergence] = Divergence("forward_kl")
    alpha: float = 0.5
    version: int = 2
    ranges: ClassVar = {"alpha": NOT_NEGATIVE}

    def __post_init__(self):
        super().__post_init__()
        if self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, got {self.version!r}")

    @property
    def outputs(self) -> tuple[str, ...]:
        return (*super().outputs, "divergence")

    def scores(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        """[S] r + alpha D: their difference is the margin."""
        drift = segment_sum(stats.divergence, batch)
        if self.version == 1:
            return super().scores(stats, batch) + drift
        chosen, rejected = pairs(drift)
        return super().scores(stats, batch) + self.alpha * interleaved(chosen.detach(), rejected)

    def metrics(self, stats: TokenStats, batch: TokenBatch) -> dict[str, Tensor]:
        chosen, rejected = pairs(segment_sum(stats.divergence, batch))
        drift = {"sequential_kl/chosen": chosen, "sequential_kl/rejected": rejected}
        return {**super().metrics(stats, batch), **drift}


TOKEN_DPO = {"tdpo": TDPO}
