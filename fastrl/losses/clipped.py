"""PPO's clipped ratio under the names that say how its tokens are averaged: GRPO and kin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.losses.policy import GPG, PPOClip, PPOTwoSided, Reinforce


@dataclass(frozen=True)
class GRPO(PPOClip):
    """Group relative policy optimisation (Shao et al. 2024, eq. 3): PPOClip, mean over a sequence, then sequences."""

    paper: ClassVar[str] = "Shao et al. 2024, arXiv:2402.03300, eq. 3"
    aggregate: ClassVar[str] = "sequence_mean_token_mean"


@dataclass(frozen=True)
class DAPO(PPOClip):
    """DAPO (Yu et al. 2025, eq. 8): clip-higher 0.2/0.28, mean over all tokens of the step."""

    paper: ClassVar[str] = "Yu et al. 2025, arXiv:2503.14476, eq. 8"
    clip_high: float = 0.28


@dataclass(frozen=True)
class BNPO(PPOClip):
    """BNPO (Xiao et al. 2025) as trainers name it: PPOClip, mean over all tokens (of the step, however it is cut)."""

    paper: ClassVar[str] = "Xiao et al. 2025, arXiv:2506.02864"


@dataclass(frozen=True)
class DrGRPO(PPOClip):
    """Dr. GRPO (Liu et al. 2025): tokens summed and divided by a constant length, so length earns nothing.

    max_length: the completion limit (tokens). Use with advantages that are not divided by the group's std.
    """

    paper: ClassVar[str] = "Liu et al. 2025, arXiv:2503.20783, eq. 5"
    max_length: int = 0
    aggregate: ClassVar[str] = "constant"

    def __post_init__(self):
        super().__post_init__()
        if self.max_length < 0:
            raise ValueError(f"max_length must be the completion limit in tokens, got {self.max_length}")


CLIPPED = {
    "reinforce": Reinforce,
    "gpg": GPG,
    "ppo_clip": PPOClip,
    "ppo_two_sided": PPOTwoSided,
    "grpo": GRPO,
    "dapo": DAPO,
    "dr_grpo": DrGRPO,
    "bnpo": BNPO,
}
