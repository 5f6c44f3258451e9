"""Gradients in the forward, for trainers whose loss is known before TRL has made it.

TRL makes its loss of the log-probs that it is given, so a head would have to wait for the backward. But for some
trainers dL/dlogp_t is known up to one factor when the forward runs: -1 for SFT's NLL, -p_t for DFT, -A_t / n for a
policy loss on its own samples. The head's gradients are then made beside the log-probs, in one pass (3 GEMMs, 2 with a
frozen head), and the backward only scales them, after it has held what came from TRL's loss against what was expected.
Anything else that comes is differentiated as it comes, by a second pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastrl.integrations.linear import LinearForm
from fastrl.losses.kl import safe_exp
from fastrl.ops import fused_loss, linear_logprobs
from fastrl.tokens import TokenBatch, TokenStats

TOLERANCE = 1e-5  # of the largest coefficient: float32 rounding of TRL's own arithmetic


@dataclass(frozen=True)
class Expected:
    """A guess at the loss, up to a factor: sum_t c_t log p_t + k_t KL_t, with the k3 estimator. Token scope.

    c, k: read from the batch's advantages and, where a reference is there, per_token["kl_weight"].
    dft: c_t is multiplied by p_t, without gradient (Wu et al. 2025, arXiv 2508.05629).
    corrected: KL_t is multiplied by the ratio, which is 1 and has a gradient (DeepSeek-V3.2, arXiv 2512.02556, eq. 7).
    """

    dft: bool = False
    corrected: bool = False
    scope: ClassVar[str] = "token"
    aggregate: ClassVar[Callable] = staticmethod(lambda batch: torch.ones_like(batch.targets, dtype=torch.float64))

    def __call__(self, stats: TokenStats, batch: TokenBatch) -> Tensor:
        value = batch.advantages * stats.logprobs
        if self.dft:
            value = value * stats.logprobs.detach().exp()
        if batch.ref_logprobs is not None:
            back = batch.ref_logprobs - stats.logprobs
            kl = safe_exp(back) - back - 1
            ratio = (stats.logprobs - stats.logprobs.detach()).exp() if self.corrected else 1.0
            value = value + batch.per_token["kl_weight"] * kl * ratio
        return value


@dataclass(frozen=True)
class Guess:
    """What is expected of a call, on its N scored rows: c [N], and for a KL term ref_logprobs and its weight [N].

    misses: where a loss that was not expected leaves a word.
    """

    objective: Expected
    c: Tensor
    ref_logprobs: Tensor | None = None
    kl_weight: Tensor | None = None
    misses: list[str] = field(default_factory=list)

    def batch(self, targets: Tensor) -> TokenBatch:
        more = {} if self.kl_weight is None else {"kl_weight": self.kl_weight}
        return TokenBatch(
            targets, advantages=self.c, ref_logprobs=self.ref_logprobs, per_token=more, num_tokens=1, num_sequences=1
        )


def one_pass(form: LinearForm, targets: Tensor, guess: Guess, how: dict[str, Any]) -> TokenStats:
    """Statistics of `linear_logprobs`, log-probs and entropy with a graph. how: its options."""
    batch = guess.batch(targets)
    made = fused_loss(guess.objective, form.hidden, form.weight, batch, form.bias, **how)
    stats = made.stats
    leaf = stats.logprobs.clone().requires_grad_()
    with torch.enable_grad():
        value = guess.objective(TokenStats(logprobs=leaf), batch).sum()
    expected = torch.autograd.grad(value, leaf)[0]
    again = {k: x for k, x in how.items() if k != "outputs"}
    rest = (expected, targets, again, guess.misses)
    stats.logprobs, stats.entropy = _Known.apply(made.loss, *form, stats.logprobs, stats.entropy, *rest)
    return stats


class _Known(torch.autograd.Function):
    """log-probs whose backward hands a multiple of `expected` on to the guessed loss, and anything else to the head.

    entropy, if it is there, was not expected to have a gradient: one that comes goes to the head with the log-probs'.
    """

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, logprobs, entropy, expected, targets, how, misses):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, expected, targets)
        ctx.how, ctx.misses = how, misses
        return logprobs.clone(), None if entropy is None else entropy.clone()

    @staticmethod
    def backward(ctx, upstream, d_entropy):
        hidden, weight, bias, expected, targets = ctx.saved_tensors
        given = {n: x for n, x in (("logprobs", upstream), ("entropy", d_entropy)) if x is not None}
        if not given:
            return (None,) * 10
        factor = common_factor(upstream, expected) if d_entropy is None else None
        if factor is not None:
            return factor.to(upstream.dtype), *(None,) * 9
        if all(bool(x.isfinite().all()) for x in given.values()):  # an overflow tells nothing of the law
            ctx.misses.append(" and ".join(given))
        own, needs = (hidden, weight, bias), ctx.needs_input_grad[1:4]
        inputs = [None if x is None else x.detach().requires_grad_(n) for x, n in zip(own, needs, strict=True)]
        how = ctx.how | {"outputs": tuple(given), "strategy": "two_pass"}
        with torch.enable_grad():
            made = linear_logprobs(inputs[0], inputs[1], targets, inputs[2], **how)
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        grads = iter(torch.autograd.grad([getattr(made, n) for n in given], wanted, list(given.values())))
        return None, *(next(grads) if n else None for n in needs), *(None,) * 6


def common_factor(upstream: Tensor, expected: Tensor) -> Tensor | None:
    """f with upstream = f * expected to rounding, or None."""
    u, e = upstream.double(), expected.double()
    largest, square = u.abs().amax() if u.numel() else u.sum(), e.square().sum()
    factor = torch.where(square > 0, (u * e).sum() / square.clamp(min=torch.finfo(e.dtype).tiny), 0.0)
    apart = (u - factor * e).abs()
    return factor if bool((apart <= TOLERANCE * largest).all()) else None


# -- what each trainer's loss is expected to be ------------------------------------------------------------------------
def of_sft(trainer: Any) -> Callable[[Tensor], Guess] | None:
    """The guess at SFT's loss, of the mask [B, L-1] of scored rows."""
    kinds = {"nll": Expected(), "dft": Expected(dft=True)}
    objective = kinds.get(trainer.args.loss_type)
    if objective is None:
        return None
    return lambda mask: Guess(objective, torch.full((int(mask.sum()),), -1.0, device=mask.device))


def of_grpo(trainer: Any, inputs: dict[str, Any]) -> Callable[[Tensor], Guess] | None:
    """The guess at GRPO's loss on the policy's own samples, of the mask [B, L-1], or None where there is none.

    At ratio 1 every clipped, soft or sequence-level ratio has derivative 1 in each of its log-probs, up to the length.
    """
    advantages, kind = inputs["advantages"], trainer.loss_type
    odd = trainer._entropy_bonus_enabled or trainer.use_vllm or trainer.off_policy_mask_threshold is not None
    odd = odd or trainer.top_entropy_quantile < 1.0 or kind == "vespo"
    if odd or inputs.get("old_per_token_logps") is not None or advantages.dim() != 1:
        return None
    mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
    share = mask.float()
    if kind in ("grpo", "sapo"):  # a mean over each sequence; by the longest, so that half precision keeps the digits
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        share = mask * (lengths.max() / lengths)
    made = {"c": -advantages[:, None] * share}
    corrected = trainer.args.use_bias_correction_kl
    if trainer.beta != 0.0:
        if corrected and trainer.importance_sampling_level == "sequence":
            return None
        made |= {"ref_logprobs": inputs["ref_per_token_logps"], "kl_weight": trainer.beta * share}

    def guess(scored: Tensor) -> Guess:
        width = share.shape[1]
        return Guess(Expected(corrected=corrected), **{name: x[scored[:, -width:]] for name, x in made.items()})

    return guess


@contextlib.contextmanager
def expecting(forward: Any, guess: Callable[[Tensor], Guess] | None) -> Iterator[None]:
    """For the calls inside, the forward takes this guess."""
    forward.guess = guess
    try:
        yield
    finally:
        forward.guess = None
