"""Advantages: of completions from the rewards of their group ([S]), of tokens from a value function or from what is
still to come ([T]). `estimate` picks one of ESTIMATORS by name."""

from __future__ import annotations

import difflib
import inspect

from torch import Tensor

from fastrl.advantages.pools import Everywhere, alone
from fastrl.advantages.returns import (
    check_gae,
    discounted_returns,
    gae,
    length_adaptive_lambda,
    reverse_scan,
    vapo,
)
from fastrl.advantages.running import RunningBaseline
from fastrl.advantages.sequences import (
    EPS,
    ESTIMATORS,
    SCALES,
    group_normalised,
    normalised,
    optimal_values,
    peer_groups,
)
from fastrl.advantages.shaping import kl_penalised, length_penalised, soft_overlong, token_rewards
from fastrl.advantages.tokenwise import optimal_token_baseline, process_grpo, reinforce_pp_tokens, whitened

COLUMNS = ("lengths", "greedy_rewards", "components", "weights")  # what an estimator may ask for beside the rewards


def estimate(
    name: str,
    rewards: Tensor,
    group_ids: Tensor,
    *,
    columns: dict[str, Tensor] | None = None,
    everywhere: Everywhere = alone,
    **numbers,
) -> Tensor:
    """[S] advantages by the estimator called `name`.

    Args:
        rewards: [S], NaN where unscored. group_ids: [S] int. columns: whatever the caller has of COLUMNS (lengths [S],
            greedy_rewards [S], components [S, K], weights [K]); the estimator takes those that it names.
        everywhere: [n] of this rank -> [ranks * n]. numbers: the estimator's own options.
    Raises: ValueError for an unknown name or number, with the nearest that exists, or a column that is missing.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"unknown advantage estimator {name!r}{_nearest(name, ESTIMATORS)}; {', '.join(ESTIMATORS)}")
    takes = {n: p for n, p in inspect.signature(ESTIMATORS[name]).parameters.items() if p.kind is p.KEYWORD_ONLY}
    own = [n for n in takes if n not in (*COLUMNS, "everywhere")]
    for key in numbers:
        if key not in own:
            near = _nearest(key, own)
            raise ValueError(f"{name} has no option {key!r}{near}; it has: {', '.join(own) or 'none'}")
    given = {n: x for n, x in (columns or {}).items() if n in takes and x is not None}
    missing = [n for n in takes if n in COLUMNS and takes[n].default is inspect.Parameter.empty and n not in given]
    if missing:
        raise ValueError(f"{name} needs {missing[0]} of every completion; columns has {', '.join(columns or {})}")
    if "everywhere" in takes:
        given["everywhere"] = everywhere
    return ESTIMATORS[name](rewards, group_ids, **given, **numbers)


def _nearest(word: str, options) -> str:
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


__all__ = [
    "COLUMNS",
    "EPS",
    "ESTIMATORS",
    "SCALES",
    "RunningBaseline",
    "alone",
    "check_gae",
    "discounted_returns",
    "estimate",
    "gae",
    "group_normalised",
    "kl_penalised",
    "length_adaptive_lambda",
    "length_penalised",
    "normalised",
    "optimal_token_baseline",
    "optimal_values",
    "peer_groups",
    "process_grpo",
    "reinforce_pp_tokens",
    "reverse_scan",
    "soft_overlong",
    "token_rewards",
    "vapo",
    "whitened",
]
