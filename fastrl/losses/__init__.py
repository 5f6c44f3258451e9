"""Every loss by name. An objective is its formula; adding one is a law in a file and a line in that file's table."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from fastrl.losses.clipped import CLIPPED, DAPO, GRPO, DrGRPO
from fastrl.losses.combine import Sum
from fastrl.losses.contrastive_lists import CONTRASTIVE_LISTS
from fastrl.losses.covariance import COVARIANCE
from fastrl.losses.distillation import DISTILLATION, REFUSED
from fastrl.losses.kl import kl_estimate, safe_exp
from fastrl.losses.kto import UNPAIRED
from fastrl.losses.links import LINKS
from fastrl.losses.listwise import LISTWISE
from fastrl.losses.nash import NASH
from fastrl.losses.pairwise import PAIRWISE
from fastrl.losses.policy import PPOClip, Reinforce
from fastrl.losses.preference import DPO, PREFERENCE
from fastrl.losses.ratio import RATIO
from fastrl.losses.reference_free import REFERENCE_FREE
from fastrl.losses.regression import REGRESSION
from fastrl.losses.regression_pairs import REGRESSION_PAIRS
from fastrl.losses.reward import REWARD
from fastrl.losses.reward_ratings import RATINGS
from fastrl.losses.sequence_ratio import SEQUENCE_RATIO
from fastrl.losses.stepwide import STEPWIDE
from fastrl.losses.supervised import NLL, SUPERVISED
from fastrl.losses.token_dpo import TOKEN_DPO
from fastrl.losses.value import VALUE

POLICY = {**CLIPPED, **RATIO, **SEQUENCE_RATIO, **COVARIANCE, **REGRESSION}
TABLE = {
    **SUPERVISED,
    **DISTILLATION,
    **POLICY,
    **PREFERENCE,
    **UNPAIRED,
    **REFERENCE_FREE,
    **PAIRWISE,
    **LINKS,
    **NASH,
    **REGRESSION_PAIRS,
    **STEPWIDE,
    **TOKEN_DPO,
    **CONTRASTIVE_LISTS,
    **LISTWISE,
    **REWARD,
    **RATINGS,
    **VALUE,
}
# Names of other trainers -> ours.
ALIASES = {"sigmoid": "dpo", "rpo": "dpo_nll"}


def names() -> list[str]:
    """Names that `get` knows, aliases aside."""
    return list(TABLE)


def get(name: str, **numbers):
    """The frozen objective called `name` with its paper's defaults, changed by keyword.

    Raises ValueError for an unknown name or number, with the nearest that exists.
    """
    kind = law(name)
    known = [f.name for f in dataclasses.fields(kind)]
    for key in numbers:
        if key not in known:
            raise ValueError(
                f"loss {name!r} has no option {key!r}{_nearest(key, known)}; it has: {', '.join(known) or 'none'}"
            )
    return kind(**numbers)


def law(name: str) -> type:
    """The class behind a name or alias. Raises ValueError for an unknown one, with the nearest that exists."""
    found = TABLE.get(ALIASES.get(name, name))
    if found is None:
        if name in REFUSED:
            raise ValueError(f"loss {name!r} is not offered: {REFUSED[name]}")
        near = _nearest(name, [*TABLE, *ALIASES])
        raise ValueError(f"unknown loss {name!r}{near}; fastrl.losses.names() lists them")
    return found


def combined(several: str | Sequence[str], weights: Sequence[float] | None = None, **numbers):
    """One loss, or the weighted sum of several, as TRL's `loss_type` and `loss_weights` give them.

    Args:
        several: a name or names. weights: one for each; None: 1 each. numbers: go to every term that has them.
    Raises: ValueError for unknown names, another number of weights than names, or an option that no term has.
    """
    several = [several] if isinstance(several, str) else list(several)
    weights = [1.0] * len(several) if weights is None else list(weights)
    if len(weights) != len(several):
        raise ValueError(f"{len(several)} losses ({', '.join(several)}) but {len(weights)} weights; give one for each")
    fields = [{f.name for f in dataclasses.fields(law(name))} for name in several]
    for key in numbers:
        if not any(key in own for own in fields):
            known = sorted(set().union(*fields))
            raise ValueError(f"none of {', '.join(several)} has an option {key!r}{_nearest(key, known)}")
    made = [
        get(name, **{k: v for k, v in numbers.items() if k in own}) for name, own in zip(several, fields, strict=True)
    ]
    if len(made) == 1 and weights[0] == 1.0:
        return made[0]
    return Sum(tuple(zip(map(float, weights), made, strict=True)))


def _nearest(word: str, options) -> str:
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


__all__ = [
    "DAPO",
    "DPO",
    "GRPO",
    "NLL",
    "DrGRPO",
    "PPOClip",
    "Reinforce",
    "Sum",
    "combined",
    "get",
    "kl_estimate",
    "law",
    "names",
    "safe_exp",
]
