"""The suite must notice: each planted mistake makes the named check fail, and without it the same check passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import test_operators
import torch
from oracle import problem
from test_invariance import check_invariance
from test_losses import CASES, check_paper, check_small_k3
from test_operators import DTYPES, OPTIONS, check_accurate, check_exact, check_flat_error
from test_regimes import check_confident, check_offset, check_regime

import fastrl.losses.kl
import fastrl.losses.margin
import fastrl.losses.policy
import fastrl.losses.preference
import fastrl.objective
import fastrl.ops.fused as fused
from fastrl.ops import native_backend, rows_native, rows_torch, torch_backend, walk
from fastrl.ops.head import Coefs, Saved

MUTANTS: dict[str, tuple[Callable, Callable]] = {}


# -- the checks, as the suite itself calls them --------------------------------------------------------------------
def operators(options="bias", names=("logprobs", "entropy", "logsumexp")):
    return lambda: check_exact(problem(**OPTIONS[options]), names, workspace_bytes=37 * 8 * 5)


def dropping_rows():
    p = problem(n=16, bias=True)
    p.upstream = {n: u * (torch.arange(16) % 4 == 1) for n, u in p.upstream.items()}
    check_exact(p)


def paper(name, i=-1, head="everything", aggregate=None):
    def check():
        for seed in range(3):
            check_paper(name, CASES[name][i], head, aggregate, seed)

    return check


def split(name, aggregate=None):
    return lambda: check_invariance(name, aggregate)


# -- the mistakes ----------------------------------------------------------------------------------------------------
def mutant(check: Callable):
    """Registers a function that plants one mistake through monkeypatch, with the check that must fail."""

    def register(plant):
        MUTANTS[plant.__name__] = (plant, check)
        return plant

    return register


def wrap(patch, owner, name: str, change: Callable) -> None:
    """Replace owner.name by change(original)."""
    patch.setattr(owner, name, change(getattr(owner, name)))


def in_rows(patch, method: str, change: Callable) -> None:
    """Change the arguments of the row work, in torch and in C++: of fold (state, raw, head, bias, targets, word,
    outputs) or of dlogits (raw, head, bias, targets, word, law, keep, out)."""
    for module in (rows_torch, rows_native):
        wrap(patch, module.Rows, method, lambda f: lambda self, *args: f(self, *change(*args)))


def in_dlogits(patch, change: Callable) -> None:
    in_rows(patch, "dlogits", change)


def in_law(patch, change: Callable) -> None:
    """Change the arguments (head, saved, coefs) of the law of the gradient."""
    wrap(patch, walk, "row_law", lambda f: lambda *args: f(*change(*args)))


@mutant(operators())
def zero_weight_gradient(patch):
    wrap(patch, walk.Gradients, "finish", lambda f: lambda self: (lambda h, w, b: (h, w * 0, b))(*f(self)))


@mutant(operators())
def zero_bias_gradient(patch):
    wrap(patch, walk.Gradients, "finish", lambda f: lambda self: (lambda h, w, b: (h, w, b * 0))(*f(self)))


@mutant(operators())
def last_rows_dropped_from_the_gradients(patch):
    wrap(patch, walk.Gradients, "add", lambda f: lambda self, sources, *rest: f(self, sources[:-1], *rest))


def overwriting(f):
    def again(self, *args):
        self.fresh = True
        f(self, *args)

    return again


@mutant(paper("nll"))
def every_chunk_overwrites_the_last(patch):
    wrap(patch, walk.Gradients, "add", overwriting)


@mutant(paper("nll"))
def next_chunk_takes_the_logits_before_they_are_used(patch):
    def change(f):
        def early(self, sources, ahead=None):
            for _ in ahead.tiles if ahead else ():
                ahead.step()
            f(self, sources)

        return early

    wrap(patch, walk.Gradients, "add", change)


@mutant(lambda: check_accurate(problem(n=48, h=64, v=601, dtype=DTYPES["fp32"])))
def last_tile_of_words_dropped_from_the_forward(patch):
    def change(f):
        def short(self):
            self.tiles = self.tiles[:-1]
            return f(self)

        return short

    wrap(patch, walk.Forward, "finish", change)


@mutant(lambda: check_accurate(problem(n=48, h=64, v=601, dtype=DTYPES["fp32"])))
def last_tile_of_words_dropped_from_the_backward(patch):
    wrap(patch, walk.Gradients, "add", dropping_the_last_tile)


def dropping_the_last_tile(f):
    def dropped(self, *args):
        own, true = getattr(self, "walk", self), walk.Walk.tiles
        own.tiles = lambda columns: list(true(own, columns))[:-1]
        try:
            return f(self, *args)
        finally:
            del own.tiles

    return dropped


@mutant(lambda: check_flat_error(torch.bfloat16))
def weight_gradient_summed_in_bfloat16(patch):
    def change(f):
        def rounded(self, *args):
            f(self, *args)
            self.d_weight.copy_(self.d_weight.bfloat16())

        return rounded

    wrap(patch, walk.Gradients, "add", change)


@mutant(operators("temperature"))
def temperature_missing_in_the_backward(patch):
    in_dlogits(patch, lambda raw, head, *rest: (raw, dataclasses.replace(head, temperature=1.0), *rest))


@mutant(operators("logit_scale"))
def logit_scale_missing_in_the_backward(patch):
    in_dlogits(patch, lambda raw, head, *rest: (raw, dataclasses.replace(head, logit_scale=1.0), *rest))


@mutant(operators("softcap"))
def softcap_slope_missing(patch):
    in_dlogits(patch, lambda raw, head, *rest: (raw, dataclasses.replace(head, softcap=None), *rest))


@mutant(operators("per_token_temperature"))
def temperatures_of_other_rows(patch):
    def change(raw, head, *rest):
        return raw, dataclasses.replace(head, temperature=head.temperature.flip(0)), *rest

    in_dlogits(patch, change)


@mutant(operators())
def target_off_by_one_in_the_gradient(patch):
    in_dlogits(patch, lambda raw, head, bias, targets, *rest: (raw, head, bias, (targets + 1) % len(raw), *rest))


@mutant(operators())
def target_off_by_one_in_the_forward(patch):
    in_rows(patch, "fold", lambda s, raw, head, bias, t, *rest: (s, raw, head, bias, (t + 1) % len(raw), *rest))


@mutant(operators(names=("entropy",)))
def entropy_gradient_dropped(patch):
    in_law(patch, lambda head, saved, c: (head, saved, Coefs(c.logprobs, c.entropy * 0, c.logsumexp)))


@mutant(operators(names=("entropy",)))
def entropy_gradient_forgets_the_entropy_itself(patch):
    in_law(patch, lambda head, saved, coefs: (head, dataclasses.replace(saved, entropy=saved.entropy * 0), coefs))


@mutant(operators(names=("logsumexp",)))
def logsumexp_gradient_with_the_wrong_sign(patch):
    in_law(patch, lambda head, saved, c: (head, saved, Coefs(c.logprobs, c.entropy, -c.logsumexp)))


@mutant(operators())
def log_sum_with_the_wrong_sign(patch):
    in_law(patch, lambda head, s, coefs: (head, Saved(s.max, -s.log_sum, s.logprobs, s.entropy), coefs))


@mutant(operators())
def upstream_gradients_replaced_by_their_mean(patch):
    def change(f):
        def mean(head, hidden, targets, saved, coefs, *rest):
            return f(head, hidden, targets, saved, Coefs(*(c.mean().expand_as(c) for c in coefs.present())), *rest)

        return mean

    for backend in (torch_backend, native_backend):
        wrap(patch, backend, "gradients", change)


@mutant(dropping_rows)
def hidden_gradient_not_scattered_back(patch):
    def front(f):
        def source(self, chosen, *rest, **more):
            made = f(self, chosen, *rest, **more)
            made.rows = slice(0, chosen.shape[0])
            return made

        return source

    wrap(patch, walk.Walk, "source", front)


@mutant(paper("ppo_clip", 0))
def hidden_gradient_of_kept_rows_not_scattered_back(patch):
    hidden_gradient_not_scattered_back(patch)


@mutant(paper("ppo_clip", 0))
def kept_rows_compacted_with_the_wrong_index(patch):
    def change(raw, head, bias, targets, word, law, keep, out):
        return raw, head, bias, targets, word, law, None if keep is None else torch.arange(keep.shape[0]), out

    in_dlogits(patch, change)


@mutant(lambda: check_offset(-1e4))
def maximum_starts_at_zero(patch):
    """The verl#7439 class: all-negative logits reduced from an identity of 0."""
    def change(f):
        def state(*args):
            made = f(*args)
            made.top.zero_()
            return made

        return state

    wrap(patch, walk, "new_state", change)


@mutant(lambda: check_confident(1e-9))
def log_of_the_whole_sum(patch):
    patch.setattr(torch, "log1p", lambda x: torch.log(1 + x))


@mutant(lambda: check_confident(1e-6))
def one_minus_p_by_subtraction(patch):
    patch.setattr(torch, "expm1", lambda x: torch.exp(x) - 1)


@mutant(lambda: check_regime("scale_640", torch.bfloat16))
def forward_logits_rounded_to_bfloat16_but_not_the_backwards(patch):
    """The marin#8217 class: the normaliser belongs to other logits than the probabilities."""

    def change(state, raw, *rest):
        rounded = torch.zeros(raw.shape[0], -(-raw.shape[1] // 16) * 16)[:, : raw.shape[1]]
        return state, rounded.copy_(raw.bfloat16()), *rest

    in_rows(patch, "fold", change)


@mutant(lambda: check_accurate(problem(n=48, h=64, v=211, dtype=DTYPES["fp32"], scale=3.0)))
def logits_rounded_to_bfloat16(patch):
    def change(f):
        def rounded(self, a, b, out, beta=0):
            return f(self, a, b, out, beta) if beta else out.copy_(f(self, a, b, out).bfloat16())

        return rounded

    wrap(patch, walk.Walk, "mm", change)


@mutant(lambda: check_regime("inf_columns", torch.float64))
def zero_times_minus_infinity(patch):
    """The TRL#7221 class: p log p of a masked word taken as it stands."""
    patch.setattr(rows_torch, "FAR", torch.inf)


@mutant(operators("ignored"))
def ignore_index_not_honoured(patch):
    wrap(patch, test_operators, "linear_logprobs", lambda f: lambda *args, ignore_index, **rest: f(*args, **rest))


@mutant(paper("nll"))
def mask_ignored(patch):
    wrap(patch, fused, "compact", lambda f: lambda batch, index: f(dataclasses.replace(batch, mask=None), index))


@mutant(split("nll"))
def normaliser_of_the_micro_batch(patch):
    def change(f):
        return lambda batch, *rest: f(dataclasses.replace(batch, num_tokens=batch.targets.shape[0]), *rest)

    wrap(patch, fastrl.objective, "_sequence_token_weight", change)


@mutant(split("grpo"))
def sequences_counted_in_the_micro_batch(patch):
    def change(f):
        return lambda batch, *rest: f(dataclasses.replace(batch, num_sequences=batch.num_segments), *rest)

    wrap(patch, fastrl.objective, "_sequence_token_weight", change)


@mutant(split("nll", "prompt_mean"))
def group_tokens_counted_in_the_micro_batch(patch):
    wrap(patch, fastrl.objective, "_prompt_weight", lambda f: lambda b: f(dataclasses.replace(b, group_tokens=None)))


@mutant(paper("nll"))
def normaliser_counts_masked_tokens(patch):
    """The TRL#6369 class."""

    def change(f):
        def counted(batch, index):
            kept, rows = f(batch, index)
            return dataclasses.replace(kept, num_tokens=batch.targets.shape[0]), rows

        return counted

    wrap(patch, fused, "compact", change)


@mutant(paper("dpo"))
def pair_weighs_as_one_sequence(patch):
    wrap(patch, fused, "unit_weights", lambda f: lambda *args: f(*args) / 2)


@mutant(paper("dapo", 0))
def clip_bounds_swapped(patch):
    wrap(
        patch,
        fastrl.losses.policy.PPOClip,
        "bounds",
        lambda f: (
            lambda self, d, a: f(dataclasses.replace(self, clip_low=self.clip_high, clip_high=self.clip_low), d, a)
        ),
    )


@mutant(paper("ppo_clip", 0))
def clipped_whatever_the_sign_of_the_advantage(patch):
    cls = fastrl.losses.policy.PPOClip
    wrap(patch, cls, "bounds", lambda f: lambda self, d, a: (d > 0.1823, d < -0.2231, torch.zeros_like(d > 0)))


@mutant(paper("ppo_clip"))
def dual_clip_forgotten(patch):
    wrap(
        patch,
        fastrl.losses.policy.PPOClip,
        "bounds",
        lambda f: lambda self, d, a: (*f(self, d, a)[:2], torch.zeros_like(d > 0)),
    )


@mutant(paper("grpo"))
def kl_with_its_arguments_swapped(patch):
    wrap(patch, fastrl.losses.policy, "kl_estimate", lambda f: lambda kind, logp, ref: f(kind, 2 * ref - logp, ref))


@mutant(paper("grpo"))
def kl_of_the_wrong_kind(patch):
    wrap(patch, fastrl.losses.policy, "kl_estimate", lambda f: lambda kind, logp, ref: f("k2", logp, ref))


@mutant(check_small_k3)
def k3_as_written(patch):
    patch.setattr(fastrl.losses.kl, "exp_above_tangent", lambda x: torch.exp(x) - 1 - x)


@mutant(paper("reinforce", 1))
def entropy_bonus_with_the_wrong_sign(patch):
    wrap(
        patch,
        fused,
        "value_of",
        lambda f: lambda o, s, *rest: f(dataclasses.replace(o, entropy_coef=-o.entropy_coef), s, *rest),
    )


@mutant(paper("dpo"))
def chosen_and_rejected_swapped(patch):
    wrap(patch, fastrl.losses.margin, "pairs", lambda f: lambda x: f(x)[::-1])


@mutant(paper("dpo", 1))
def label_smoothing_forgotten(patch):
    cls = fastrl.losses.preference.DPO
    wrap(patch, cls, "__call__", lambda f: lambda self, *args: f(dataclasses.replace(self, label_smoothing=0.0), *args))


@mutant(paper("nll"))
def upstream_scalar_forgotten(patch):
    wrap(
        patch,
        fused._OnePass,
        "backward",
        lambda f: staticmethod(lambda ctx, upstream: f(ctx, torch.ones_like(upstream))),
    )


@mutant(paper("reinforce", 0))
def advantages_of_the_first_chunk_everywhere(patch):
    cls = fused.TokenBatch
    wrap(patch, cls, "window", lambda f: lambda self, a, b: f(self, 0, b - a))


@pytest.mark.parametrize("name", MUTANTS)
def test_the_suite_notices(name, monkeypatch):
    plant, check = MUTANTS[name]
    check()
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            check()


def test_mutants_restore_what_they_change():
    assert torch.log1p(torch.zeros(1)) == 0
    operators()()
