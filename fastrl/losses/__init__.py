"""Every loss by name. An objective is its formula; adding one is a function in a file and a line in this table."""

from __future__ import annotations

import dataclasses
import difflib

from fastrl.losses.kl import kl_estimate, safe_exp
from fastrl.losses.policy import DAPO, GRPO, DrGRPO, PPOClip, Reinforce
from fastrl.losses.preference import DPO
from fastrl.losses.supervised import NLL

TABLE = {
    "nll": NLL,
    "reinforce": Reinforce,
    "ppo_clip": PPOClip,
    "grpo": GRPO,
    "dapo": DAPO,
    "dr_grpo": DrGRPO,
    "dpo": DPO,
}


def names() -> list[str]:
    """Names that `get` knows."""
    return list(TABLE)


def get(name: str, **numbers):
    """The frozen objective called `name` with its paper's defaults, changed by keyword.

    Raises ValueError for an unknown name or number, with the nearest that exists.
    """
    if name not in TABLE:
        raise ValueError(f"unknown loss {name!r}{_nearest(name, TABLE)}; fastrl.losses.names() lists them")
    known = [f.name for f in dataclasses.fields(TABLE[name])]
    for key in numbers:
        if key not in known:
            raise ValueError(
                f"loss {name!r} has no option {key!r}{_nearest(key, known)}; it has: {', '.join(known) or 'none'}"
            )
    return TABLE[name](**numbers)


def _nearest(word: str, options) -> str:
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


__all__ = ["DAPO", "DPO", "GRPO", "NLL", "DrGRPO", "PPOClip", "Reinforce", "get", "kl_estimate", "names", "safe_exp"]
