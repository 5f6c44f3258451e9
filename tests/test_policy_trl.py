"""The policy losses against TRL's own loss code, which is handed log-probs and entropies in the place of its model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from oracle import assert_same

from fastrl import TokenBatch, TokenStats, loss_from_logprobs, losses
from fastrl.losses.corrections import OPSM, SequenceMask, SequenceTruncate, TokenMask, TokenTruncate

trl_grpo = pytest.importorskip("trl.trainer.grpo_trainer")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
B, T, LENGTHS = 6, 7, (7, 3, 5, 1, 7, 4)
MASK = torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors():
    """[B, T] log-probs of each policy and entropies, [B] advantages."""
    logp = -randn(B, T, seed=0).abs() - 0.1
    made = {name: logp + 0.3 * randn(B, T, seed=i + 1) for i, name in enumerate(("old", "ref", "rollout"))}
    return {"logp": logp, **made, "entropy": randn(B, T, seed=8).abs(), "advantages": randn(B, seed=9)}


class Accelerator:
    num_processes, sync_gradients = 1, True

    def gather(self, x):
        return x

    def gather_for_metrics(self, x):
        return x

    def reduce(self, x, reduction="sum"):
        return x

    def pad_across_processes(self, x, dim=0, pad_index=0):
        return x


def trainer(kind, logp, entropy, **changed):
    """As much of a TRL trainer as its loss reads."""
    args = {
        "use_bias_correction_kl": False, "delta": None, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
        "steps_per_generation": 1,
    }  # fmt: skip
    own = {
        "aux_loss_enabled": False, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "importance_sampling_level": "token", "beta": 0.0, "loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.2,
        "use_vllm": False, "vllm_importance_sampling_correction": False, "current_gradient_accumulation_steps": 1,
        "max_completion_length": 11, "_entropy_bonus_enabled": False, "use_adaptive_entropy": False,
        "entropy_coef": 0.0, "model": SimpleNamespace(training=True), "accelerator": Accelerator(),
    }  # fmt: skip
    args |= {n: changed.pop(n) for n in list(changed) if n in args}
    made = object.__new__(kind)
    metrics = {m: defaultdict(list) for m in ("train", "eval")}
    made.__dict__.update({**own, **changed, "args": SimpleNamespace(**args), "_metrics": metrics})
    made.__dict__["_get_per_token_logps_and_entropies"] = lambda *a, **k: (logp, entropy, None)
    return made


def theirs(kind, changed, extra=()):
    """(loss, gradients [B, T] of log-probs and entropies, metrics) of TRL's code."""
    x = tensors()
    leaves = [x["logp"].clone().requires_grad_(), x["entropy"].clone().requires_grad_()]
    one = torch.ones(B, 1, dtype=torch.long)
    inputs = {
        "prompt_ids": one, "prompt_mask": one, "completion_ids": torch.ones(B, T, dtype=torch.long),
        "completion_mask": MASK.long(), "advantages": x["advantages"], "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"], "num_items_in_batch": MASK.sum(), "old_logps": (x["old"] * MASK).sum(1),
        **dict(extra),
    }  # fmt: skip
    made = trainer(kind, *leaves, **changed)
    loss = made._compute_loss(None, inputs)
    return loss.detach(), gradients(loss, leaves), made._metrics["train"]


def gradients(loss, leaves):
    made = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(made, leaves, strict=True)]


def ours(name, options):
    x = tensors()
    leaves = [x["logp"].clone().requires_grad_(), x["entropy"].clone().requires_grad_()]
    ends = torch.nn.functional.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0))
    flat = {n: v[MASK] for n, v in x.items() if v.dim() == 2}
    batch = TokenBatch(
        torch.ones(int(MASK.sum()), dtype=torch.long), cu_seqlens=ends, advantages=x["advantages"],
        old_logprobs=flat["old"], ref_logprobs=flat["ref"], rollout_logprobs=flat["rollout"],
    )  # fmt: skip
    stats = TokenStats(logprobs=leaves[0][MASK], entropy=leaves[1][MASK])
    out = loss_from_logprobs(losses.get(name, **options), stats, batch)
    return out.loss.detach(), gradients(out.loss, leaves), out.metrics


def weight_of(mode: str, low=None, high=3.0):
    """TRL's importance_sampling_ratio, as its rollout code makes it."""
    x = tensors()
    d = (x["old"] - x["rollout"]) * MASK
    w = torch.exp(d.sum(-1, keepdim=True) if mode.startswith("sequence") else d)
    if mode.endswith("truncate"):
        w = w.clamp(min=low, max=high)
    else:
        w = w.masked_fill((w < (low or 0.0)) | (w > high), 0.0)
    return {"importance_sampling_ratio": w}


VLLM = {"use_vllm": True, "vllm_importance_sampling_correction": True}
SEQUENCE = {"importance_sampling_level": "sequence"}
NARROW = {"clip_low": 0.05, "clip_high": 0.08}
CASES = {
    "dapo": ("dapo", {"clip_high": 0.2}, {}),
    "dapo_clip_higher_delta": ("dapo", {"dual_clip": 1.5}, {"epsilon_high": 0.28, "delta": 1.5}),
    "dapo_kl": ("dapo", {"clip_high": 0.2, "kl_coef": 0.3}, {"beta": 0.3}),
    "dapo_is_kl": ("dapo", {"clip_high": 0.2, "kl_coef": 0.3, "kl": "is_k3"},
                   {"beta": 0.3, "use_bias_correction_kl": True}),
    "dapo_entropy": ("dapo", {"clip_high": 0.2, "entropy_coef": 0.1},
                     {"_entropy_bonus_enabled": True, "entropy_coef": 0.1}),
    "dapo_top_entropy": ("dapo", {"clip_high": 0.2, "top_entropy": 0.4, "kl_coef": 0.1},
                         {"top_entropy_quantile": 0.4, "beta": 0.1}),
    "grpo": ("grpo", {"kl_coef": 0.1}, {"loss_type": "grpo", "beta": 0.1}),
    "bnpo": ("bnpo", {}, {"loss_type": "bnpo"}),
    "dr_grpo": ("dr_grpo", {"max_length": 11}, {"loss_type": "dr_grpo"}),
    "cispo": ("cispo", {"ratio_max": 1.2, "kl_coef": 0.1}, {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.1}),
    "sapo": ("sapo", {"temperature_neg": 2.0}, {"loss_type": "sapo", "sapo_temperature_neg": 2.0}),
    "gspo": ("gspo", {**NARROW, "kl_coef": 0.1},
             {"loss_type": "grpo", **SEQUENCE, "epsilon_low": 0.05, "epsilon_high": 0.08, "beta": 0.1}),
    "luspo": ("luspo", {**NARROW, "kl_coef": 0.1},
              {"loss_type": "luspo", **SEQUENCE, "epsilon_low": 0.05, "epsilon_high": 0.08, "beta": 0.1}),
    "vespo": ("vespo", {"k_pos": 1.0, "lambda_neg": 0.5},
              {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.5}),
    "opsm": ("dapo", {"clip_high": 0.2, "corrections": (OPSM(0.02),)}, {"off_policy_mask_threshold": 0.02}),
    "two_sided": ("ppo_two_sided", {"delta": 1.5}, {"delta": 1.5}),
}  # fmt: skip
WEIGHTS = {
    "token_truncate": (TokenTruncate(0.8, 1.1), (0.8, 1.1)),
    "token_mask": (TokenMask(0.8, 1.2), (0.8, 1.2)),
    "sequence_truncate": (SequenceTruncate(0.8, 1.3), (0.8, 1.3)),
    "sequence_mask": (SequenceMask(0.0, 1.3), (None, 1.3)),
}


def check(mine, other, tolerance=1e-9):
    for what, a, b in zip(("loss", "d_logp", "d_entropy"), (mine[0], *mine[1]), (other[0], *other[1]), strict=True):
        assert_same(what, a, b, tolerance)
    for name in set(mine[2]) & set(other[2]) - {"entropy"}:
        assert float(mine[2][name]) == pytest.approx(other[2][name][0], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("case", CASES)
def test_grpo_trainer(case):
    name, options, changed = CASES[case]
    extra = {"sampling_per_token_logps": tensors()["rollout"]} if case == "opsm" else {}
    mine, other = ours(name, options), theirs(trl_grpo.GRPOTrainer, changed, extra.items())
    if case == "two_sided":  # with delta TRL counts the ratio after it was cut
        mine = (*mine[:2], {n: x for n, x in mine[2].items() if not n.startswith("clip_ratio")})
    if case.startswith("dapo_clip_higher"):
        mine = (*mine[:2], {n: x for n, x in mine[2].items() if n != "clip_ratio/region_mean"})
    if case in ("dapo_is_kl", "vespo"):  # TRL logs the weighted KL
        mine = (*mine[:2], {n: x for n, x in mine[2].items() if n != "kl"})
    check(mine, other)


@pytest.mark.parametrize("mode", WEIGHTS)
@pytest.mark.parametrize("name", ["dapo", "grpo", "cispo"])
def test_importance_sampling_modes(name, mode):
    correction, (low, high) = WEIGHTS[mode]
    options = {"ratio_max": 5.0} if name == "cispo" else {"clip_high": 0.2}
    changed = {"loss_type": name, "beta": 0.1, **VLLM, **({"epsilon_high": 5.0} if name == "cispo" else {})}
    mine = ours(name, {**options, "kl_coef": 0.1, "corrections": (correction,)})
    check(mine, theirs(trl_grpo.GRPOTrainer, changed, weight_of(mode, low, high).items()))


def test_rloo_trainer():
    from trl.trainer.rloo_trainer import RLOOTrainer

    for epsilon in (0.2, 0.9):
        mine = ours("rloo", {"clip_low": epsilon, "clip_high": epsilon})
        other = theirs(RLOOTrainer, {"epsilon_low": epsilon, "epsilon_high": epsilon})
        check(mine, other)


def test_gmpo_trainer():
    trl_gmpo = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer")
    for low, high in ((0.4, 0.4), (0.1, 0.05)):
        mine = ours("gmpo", {"clip_low": low, "clip_high": high, "kl_coef": 0.2})
        check(mine, theirs(trl_gmpo.GMPOTrainer, {"epsilon_low": low, "epsilon_high": high, "beta": 0.2}))
