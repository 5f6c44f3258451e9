"""The table of losses: complete, sourced, checked at the door, and the same in `fastrl losses` and docs/losses.md."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from fastrl import cli, losses
from fastrl.losses import card
from fastrl.objective import SCOPES, scope_of, unit_of

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = [
    (name, f.name) for name, kind in losses.TABLE.items() for f in dataclasses.fields(kind) if "float" in str(f.type)
]


def test_there_are_at_least_ninety():
    assert len(losses.names()) == len(set(losses.names())) >= 90
    assert len(set(losses.TABLE.values())) == len(losses.TABLE), "one law under two names: make one an alias"
    assert all(known in losses.TABLE and alias not in losses.TABLE for alias, known in losses.ALIASES.items())


@pytest.mark.parametrize("name", losses.names())
def test_every_loss_says_what_it_is(name):
    kind, own = losses.law(name), losses.get(name)
    assert dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen
    assert inspected(kind.paper) and inspected(kind.formula) and scope_of(own) in SCOPES and unit_of(own)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}("), "a docstring of its own"
    assert own == losses.get(name) and hash(own) == hash(losses.get(name))


def inspected(text: str) -> bool:
    """One line of plain text."""
    return isinstance(text, str) and text.strip() == text != "" and "\n" not in text and text.isascii()


# Bounds for which an infinity means no bound; options whose message names the bound that they become.
UNBOUNDED = {
    **dict.fromkeys(("dual_clip", "delta", "ratio_max", "clip_high", "behaviour_cap", "cov_high"), math.inf),
    "cov_low": -math.inf,
}
NAMED_AS = {"alpha": "beta", "ratio_min": "ratio", "ratio_max": "ratio", "behaviour_cap": "high"}
NAMED_AS |= {"clip_low": "bounds of the ratio", "clip_high": "bounds of the ratio"}


@pytest.mark.parametrize("name,option", NUMBERS)
def test_every_number_is_checked(name, option):
    for bad in (math.nan, math.inf, -math.inf):
        if bad != UNBOUNDED.get(option):
            with pytest.raises(ValueError, match=f"{option}|{NAMED_AS.get(option, option)}"):
                losses.get(name, **{option: bad})


def test_sources_are_distinct():
    """A formula under two names with the same defaults would be one loss counted twice."""
    seen: dict[tuple, str] = {}
    for name in losses.names():
        one = card.card(name)
        key = (one.kind.paper, one.kind.formula, one.scope, one.aggregate, one.options)
        assert key not in seen, f"{name} and {seen[key]} say the same"
        seen[key] = name


# -- what the cards say ------------------------------------------------------------------------------------------------
COSTS = {
    "nll": ("token", "3", "2"),
    "grpo": ("token", "3", "2"),
    "gspo": ("sequence", "3 to 4", "2 to 3"),
    "dpo": ("pair", "3 to 4", "2 to 3"),
    "aot": ("batch", "3 to 4 + 1", "2 to 3 + 1"),
    "reverse_kl": ("token", "4", "3"),
    "bradley_terry": ("pair", "none", "none"),
}


@pytest.mark.parametrize("name", COSTS)
def test_scope_and_cost(name):
    one = card.card(name)
    assert (one.scope, one.gemms, one.frozen) == COSTS[name]


READS = {
    "nll": set(),
    "grpo": {"old_logprobs [T]", "ref_logprobs [T]", "rollout_logprobs [T]", "advantages [T] or [S]"},
    "sppo": {"ref_logprobs [T]", 'per_sequence["win_rate"] [S]', 'per_token["token_weights"] [T]'},
    "nash_md": {"ref_logprobs [T]", 'per_sequence["win_rate"] [S]'},
    "rebel": {"old_logprobs [T]", "rewards [S]", "margins [P]", 'per_token["token_weights"] [T]'},
    "weighted_sft": {'per_token["weights"] [T]', 'per_sequence["weights"] [S]'},
    "fdpo": {
        "ref_logprobs [T]",
        "rewards [S]",
        "margins [P]",
        'per_sequence["policy_rewards"] [S]',
        'per_token["token_weights"] [T]',
    },
}


@pytest.mark.parametrize("name", READS)
def test_columns_that_are_read(name):
    assert set(card.card(name).reads) == READS[name]


def test_the_command(capsys):
    assert cli.main(["losses"]) == 0
    shown = capsys.readouterr().out
    for name in losses.names():
        assert f"\n{name} " in shown, name
    assert cli.main(["losses", "sigmoid"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("dpo (also: ") and "2305.18290" in shown and "label_smoothing" in shown
    assert "3 to 4; 2 to 3 with a frozen head" in shown and "ref_logprobs [T]" in shown
    assert cli.main(["losses", "--help"]) == 0
    assert cli.main(["losses", "dppo"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_the_page_is_up_to_date():
    page = (ROOT / "docs" / "losses.md").read_text()
    assert page == card.markdown(), "run: python -m fastrl.losses.card > docs/losses.md"


def test_every_loss_is_on_the_page():
    page = card.markdown()
    for name in losses.names():
        assert f"| `{name}` |" in page
    assert "docs/losses.md" in (ROOT / "README.md").read_text()
