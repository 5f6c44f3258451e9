"""What does not fit is refused at the door: typed, naming the argument, what was expected and what was given."""

from __future__ import annotations

import math
import re

import pytest
import torch

from fastrl import TokenBatch, fused_loss, linear_cross_entropy, linear_logprobs, loss_from_logprobs, losses

N, H, V = 4, 8, 11
HIDDEN, WEIGHT, TARGETS = torch.randn(N, H), torch.randn(V, H), torch.tensor([0, 1, 2, 10])


def refused(error, *words):
    """pytest.raises for a message that holds every one of the words."""
    return pytest.raises(error, match="".join(f"(?=.*{re.escape(w)})" for w in words))


HEAD_CASES = {
    "hidden and weight widths": ({"hidden": torch.randn(N, 9)}, ValueError, ("hidden", "[4, 9]", "weight", "[11, 8]")),
    "weight not a matrix": ({"weight": torch.randn(V)}, ValueError, ("hidden", "[4, 8]", "weight", "[11]")),
    "targets one short": ({"targets": TARGETS[:3]}, ValueError, ("targets", "[3]", "hidden", "[4, 8]")),
    "targets per word": ({"targets": torch.zeros(N, V).long()}, ValueError, ("targets", "[4, 11]", "[4, 8]")),
    "bias of another length": ({"bias": torch.randn(10)}, ValueError, ("bias", "[10]", "weight", "[11, 8]")),
    "hidden in another dtype": ({"hidden": HIDDEN.double()}, ValueError, ("hidden", "float64", "weight", "float32")),
    "float targets": ({"targets": TARGETS.float()}, TypeError, ("targets", "int64", "float32")),
    "bool targets": ({"targets": TARGETS > 1}, TypeError, ("targets", "bool")),
    "short targets": ({"targets": TARGETS.short()}, TypeError, ("targets", "int16")),
    "integer hidden": ({"hidden": HIDDEN.long(), "weight": WEIGHT.long()}, TypeError, ("hidden", "int64")),
    "integer bias": ({"bias": torch.zeros(V).long()}, TypeError, ("bias", "int64")),
    "hidden a list": ({"hidden": HIDDEN.tolist()}, TypeError, ("hidden", "list")),
    "weight none": ({"weight": None}, TypeError, ("weight", "NoneType")),
    "targets a list": ({"targets": TARGETS.tolist()}, TypeError, ("targets", "list")),
    "bias a number": ({"bias": 0.0}, TypeError, ("bias", "float")),
    "weight elsewhere": ({"weight": WEIGHT.to("meta")}, ValueError, ("weight", "meta", "hidden", "cpu")),
    "targets elsewhere": ({"targets": TARGETS.to("meta")}, ValueError, ("targets", "meta", "hidden", "cpu")),
    "bias elsewhere": ({"bias": torch.zeros(V, device="meta")}, ValueError, ("bias", "meta", "hidden", "cpu")),
    "target too large": ({"targets": torch.tensor([0, 1, 11, 2])}, ValueError, ("targets", "[0, V=11)", "11", "row 2")),
    "target negative": (
        {"targets": torch.tensor([0, -100, 3, -1])},
        ValueError,
        ("targets", "-1", "row 3", "ignore_index"),
    ),
    "temperature zero": ({"temperature": 0.0}, ValueError, ("temperature", "positive", "0.0")),
    "temperature negative": ({"temperature": -1.0}, ValueError, ("temperature", "-1.0")),
    "temperature nan": ({"temperature": math.nan}, ValueError, ("temperature", "nan")),
    "temperature infinite": ({"temperature": math.inf}, ValueError, ("temperature", "inf")),
    "one row's temperature": (
        {"temperature": torch.tensor([1, 1, 0.0, 1])},
        ValueError,
        ("temperature", "0.0", "row 2"),
    ),
    "one row's temperature nan": (
        {"temperature": torch.tensor([1, math.nan, 1, 1])},
        ValueError,
        ("temperature", "row 1"),
    ),
    "temperatures one short": ({"temperature": torch.ones(3)}, ValueError, ("temperature", "[3]", "[4, 8]")),
    "temperature learned": ({"temperature": torch.ones(4, requires_grad=True)}, ValueError, ("temperature", "detach")),
    "softcap zero": ({"softcap": 0.0}, ValueError, ("softcap", "0.0", "None")),
    "softcap nan": ({"softcap": math.nan}, ValueError, ("softcap", "nan")),
    "logit_scale infinite": ({"logit_scale": math.inf}, ValueError, ("logit_scale", "inf")),
    "backend unknown": ({"backend": "cuda"}, ValueError, ("backend", "'cuda'", "torch", "triton")),
    "workspace zero": ({"workspace_bytes": 0}, ValueError, ("workspace_bytes", "0")),
}


@pytest.mark.parametrize("case", HEAD_CASES)
@pytest.mark.parametrize("entry", ["linear_logprobs", "linear_cross_entropy", "fused_loss"])
def test_head_arguments(case, entry):
    changes, error, words = HEAD_CASES[case]
    given = {"hidden": HIDDEN, "weight": WEIGHT, "targets": TARGETS, "bias": None, **changes}
    targets, options = (
        given["targets"],
        {k: v for k, v in given.items() if k not in ("hidden", "weight", "targets", "bias")},
    )
    if entry != "fused_loss":
        function = linear_logprobs if entry == "linear_logprobs" else linear_cross_entropy
        with refused(error, *words):
            function(given["hidden"], given["weight"], targets, given["bias"], **options)
    elif isinstance(targets, torch.Tensor) and targets.dim() == 1 and not targets.is_meta:
        with refused(error, *words):
            batch = TokenBatch(targets)
            fused_loss(losses.get("nll"), given["hidden"], given["weight"], batch, given["bias"], **options)


def test_a_target_at_a_masked_row_may_be_anything():
    batch = TokenBatch(torch.tensor([0, 999, -5, 2]), mask=torch.tensor([True, False, False, True]))
    assert fused_loss(losses.get("nll"), HIDDEN, WEIGHT, batch).loss.isfinite()


def test_the_row_in_the_message_is_the_callers_row():
    batch = TokenBatch(torch.tensor([0, -100, 1, 42]), mask=torch.tensor([False, True, True, True]))
    with refused(ValueError, "42", "row 3"):
        fused_loss(losses.get("nll"), HIDDEN, WEIGHT, batch)


OUTPUT_CASES = {"unknown": (("logprobs", "perplexity"), "'perplexity'"), "empty": ((), "empty")}


@pytest.mark.parametrize("case", OUTPUT_CASES)
def test_outputs(case):
    outputs, word = OUTPUT_CASES[case]
    with refused(ValueError, "outputs", word, "entropy"):
        linear_logprobs(HIDDEN, WEIGHT, TARGETS, outputs=outputs)


def test_fused_loss_outputs():
    with refused(ValueError, "outputs", "'perplexity'", "entropy"):
        fused_loss(losses.get("nll"), HIDDEN, WEIGHT, TokenBatch(TARGETS), outputs=("perplexity",))


@pytest.mark.parametrize(
    "options,words",
    [
        ({"reduction": "avg"}, ("reduction", "'avg'", "mean")),
        ({"label_smoothing": 1.0}, ("label_smoothing", "1.0")),
        ({"label_smoothing": 0.1, "softcap": 3.0}, ("label_smoothing", "softcap")),
    ],
)
def test_cross_entropy_options(options, words):
    with refused(ValueError, *words):
        linear_cross_entropy(HIDDEN, WEIGHT, TARGETS, **options)


@pytest.mark.parametrize(
    "support,words",
    [
        ((torch.tensor([1, 2]), torch.tensor([0, 1, 2])), ("offsets", "N+1=5", "[3]")),
        ((torch.tensor([1, 2]), torch.tensor([0, 1, 1, 2, 3])), ("offsets", "3", "2")),
        ((torch.tensor([1, 11]), torch.tensor([0, 1, 1, 2, 2])), ("indices", "[0, V=11)", "11")),
        ((torch.tensor([1, 2]), torch.tensor([0, 2, 1, 2, 2])), ("offsets", "ascending")),
        ((torch.tensor([1, 2]), torch.tensor([1, 1, 1, 2, 2])), ("offsets", "ascending", "0")),
    ],
)
def test_support(support, words):
    with refused(ValueError, *words):
        linear_logprobs(HIDDEN, WEIGHT, TARGETS, support=support)


# -- batch ---------------------------------------------------------------------------------------------------------
BATCH_CASES = {
    "targets two-dimensional": ({"targets": TARGETS.view(2, 2)}, ValueError, ("targets", "[T]", "[2, 2]")),
    "targets float": ({"targets": TARGETS.float()}, TypeError, ("targets", "float32")),
    "mask of numbers": ({"mask": torch.ones(4)}, TypeError, ("mask", "bool", "float32")),
    "mask one long": ({"mask": torch.ones(5).bool()}, ValueError, ("mask", "T=4", "[5]")),
    "old_logprobs one short": ({"old_logprobs": torch.zeros(3)}, ValueError, ("old_logprobs", "T=4", "[3]")),
    "ref_logprobs padded": ({"ref_logprobs": torch.zeros(2, 2)}, ValueError, ("ref_logprobs", "T=4", "[2, 2]")),
    "advantages of neither length": ({"advantages": torch.zeros(3)}, ValueError, ("advantages", "T=4", "S=2", "[3]")),
    "labels per token": ({"labels": torch.ones(4).bool()}, ValueError, ("labels", "S=2", "[4]")),
    "group_ids per token": ({"group_ids": torch.zeros(4).long()}, ValueError, ("group_ids", "S=2", "[4]")),
    "rewards one long": ({"rewards": torch.zeros(3)}, ValueError, ("rewards", "S=2", "[3]")),
    "margins per sequence": ({"margins": torch.zeros(2)}, ValueError, ("margins", "P=1", "[2]")),
    "cu_seqlens ends early": ({"cu_seqlens": torch.tensor([0, 1, 3])}, ValueError, ("cu_seqlens", "3", "T=4")),
    "cu_seqlens starts late": ({"cu_seqlens": torch.tensor([1, 2, 4])}, ValueError, ("cu_seqlens", "1", "0")),
    "cu_seqlens goes back": ({"cu_seqlens": torch.tensor([0, 5, 4])}, ValueError, ("cu_seqlens", "ascend")),
    "cu_seqlens float": ({"cu_seqlens": torch.tensor([0.0, 2.0, 4.0])}, TypeError, ("cu_seqlens", "int32", "float32")),
}


@pytest.mark.parametrize("case", BATCH_CASES)
def test_batch(case):
    changes, error, words = BATCH_CASES[case]
    with refused(error, *words):
        TokenBatch(**{"targets": TARGETS, "cu_seqlens": torch.tensor([0, 1, 4]), **changes})


def call(objective, aggregate=None, **fields):
    batch = TokenBatch(**{"targets": TARGETS, "cu_seqlens": torch.tensor([0, 1, 4]), **fields})
    return fused_loss(objective, HIDDEN.clone().requires_grad_(), WEIGHT, batch, aggregate=aggregate)


def test_hidden_that_is_not_packed():
    with refused(ValueError, "hidden", "[T, H]", "[1, 4, 8]"):
        fused_loss(losses.get("nll"), HIDDEN[None], WEIGHT, TokenBatch(TARGETS))


def test_targets_in_place_of_a_batch():
    with refused(TypeError, "batch", "TokenBatch", "Tensor"):
        fused_loss(losses.get("nll"), HIDDEN, WEIGHT, TARGETS)
    with refused(TypeError, "batch", "TokenBatch", "Tensor"):
        loss_from_logprobs(losses.get("nll"), torch.zeros(N), TARGETS)


@pytest.mark.parametrize("name", ["reinforce", "ppo_clip", "grpo", "dapo", "dr_grpo"])
def test_missing_columns(name):
    options = {"max_length": 4} if name == "dr_grpo" else {}
    with refused(ValueError, "advantages"):
        call(losses.get(name, **options))
    with refused(ValueError, "ref_logprobs", "kl_coef"):
        call(losses.get(name, kl_coef=0.1, **options), advantages=torch.ones(4))


def test_missing_reference_for_dpo():
    with refused(ValueError, "DPO", "ref_logprobs", "reference_free"):
        call(losses.get("dpo"))


def test_odd_pairs():
    with refused(ValueError, "pair", "3"):
        call(losses.get("dpo", reference_free=True), cu_seqlens=torch.tensor([0, 1, 2, 4]))


def test_scope():
    def mine(stats, batch):
        return -stats.logprobs

    with refused(ValueError, "mine", "None", "token, sequence, pair, group, batch"):
        call(mine)
    mine.scope = "tokens"
    with refused(ValueError, "mine", "'tokens'", "token, sequence"):
        call(mine)
    with refused(ValueError, "scope", "'nll'", "losses.get"):
        call("nll")


@pytest.mark.parametrize(
    "scope,want", [("token", "[4]"), ("sequence", "[2]"), ("pair", "[1]"), ("group", "[1]"), ("batch", "[]")]
)
def test_value_of_the_wrong_shape(scope, want):
    def mine(stats, batch):
        return stats.logprobs.new_zeros(3)

    mine.scope = scope
    with refused(ValueError, "mine", scope, want, "[3]"):
        call(mine, group_ids=torch.tensor([5, 5]))

    def number(stats, batch):
        return 1.0

    number.scope = scope
    with refused(ValueError, "number", want, "float"):
        call(number, group_ids=torch.tensor([5, 5]))


def test_aggregate():
    with refused(ValueError, "aggregate", "'mean'", "token_mean"):
        call(losses.get("nll"), "mean")
    with refused(ValueError, "aggregate", "'token_means'", "did you mean 'token_mean'"):
        call(losses.get("nll"), "token_means")
    with refused(ValueError, "constant", "max_length"):
        call(losses.get("nll"), "constant")
    with refused(ValueError, "max_length"):
        call(losses.get("dr_grpo"), advantages=torch.ones(4))
    with refused(ValueError, "prompt_mean", "group_ids"):
        call(losses.get("nll"), "prompt_mean")
    with refused(ValueError, "aggregate", "T=4", "[2]"):
        call(losses.get("nll"), lambda batch: torch.ones(2))


# -- losses by name --------------------------------------------------------------------------------------------------
def test_unknown_loss_and_option_name_the_nearest():
    with refused(ValueError, "'grppo'", "'grpo'"):
        losses.get("grppo")
    with refused(ValueError, "'quantum'", "names()"):
        losses.get("quantum")
    with refused(ValueError, "'grpo'", "'clip_hi'", "'clip_high'"):
        losses.get("grpo", clip_hi=0.3)
    with refused(ValueError, "'nll'", "'beta'", "none"):
        losses.get("nll", beta=1)


@pytest.mark.parametrize(
    "name,options,words",
    [
        ("ppo_clip", {"clip_low": 1.5}, ("clip_low", "1.5")),
        ("ppo_clip", {"clip_high": -0.1}, ("clip_high", "-0.1")),
        ("ppo_clip", {"clip_low": math.nan}, ("clip_low", "nan")),
        ("grpo", {"dual_clip": 1.1}, ("dual_clip", "1.2", "1.1")),
        ("grpo", {"kl": "k4"}, ("kl", "'k4'", "k1, k2, k3")),
        ("dr_grpo", {"max_length": -3}, ("max_length", "-3")),
        ("dpo", {"beta": 0.0}, ("beta", "0.0")),
        ("dpo", {"beta": math.nan}, ("beta", "nan")),
        ("dpo", {"label_smoothing": 0.5}, ("label_smoothing", "0.5")),
        ("reinforce", {"kl_coef": math.nan}, ("kl_coef", "nan")),
        ("reinforce", {"entropy_coef": math.inf}, ("entropy_coef", "inf")),
    ],
)
def test_loss_numbers(name, options, words):
    with refused(ValueError, *words):
        losses.get(name, **options)


def test_loss_from_logprobs():
    batch = TokenBatch(TARGETS)
    with refused(ValueError, "logprobs", "T=4", "[3]"):
        loss_from_logprobs(losses.get("nll"), torch.zeros(3), batch)
    batch.advantages = torch.ones(4)
    with refused(ValueError, "'entropy'"):
        loss_from_logprobs(losses.get("reinforce", entropy_coef=0.1), torch.zeros(4), batch)
