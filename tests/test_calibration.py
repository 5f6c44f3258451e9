"""Score transforms and compositions against the numbers worked out by hand, and what none of them may break."""

from __future__ import annotations

import math

import pytest
import torch

from fastrl.rewards import calibration as cal
from fastrl.rewards import compose

N = 9


def t(*x) -> torch.Tensor:
    return torch.tensor(x, dtype=torch.float64)


def same(x, *want, tolerance=1e-6) -> None:
    assert x.tolist() == pytest.approx(list(want), abs=tolerance)


# -- length and tails --------------------------------------------------------------------------------------------------
def test_length_means():
    same(cal.length_mean_calibrated(t(1, 3, 7), t(10, 12, 100), 5), -1, 1, 0)
    unscored = cal.length_mean_calibrated(t(1, math.nan, 3), t(10, 11, 12), 5)
    assert unscored.isnan().tolist() == [False, True, False] and unscored[0] == -1


def test_a_linear_trend_is_taken_out():
    lengths = t(*(3, 9, 4, 25, 40, 41, 13, 17, 8, 30))
    flat = cal.length_trend_calibrated(2 + 0.3 * lengths, lengths)
    assert flat.abs().max() < 1e-9
    spiked = 2 + 0.3 * lengths + 0.2 * torch.sin(7 * lengths)
    spiked[4] += 5
    plain, robust = (cal.length_trend_calibrated(spiked, lengths, 0.9, passes=n) for n in (1, 4))
    assert robust.argmax() == 4 and robust[4] > plain[4] + 0.5  # the outlier pulls the line to itself less and less
    constant = cal.length_trend_calibrated(t(1, 1, 1, 1), t(5, 5, 5, 5))
    same(constant, 0, 0, 0, 0)


def test_reward_dropout():
    same(cal.quantile_dropout(t(1, 2, 3, 4), 0.5), 0, 0, 3, 4)
    same(cal.quantile_dropout(t(1, 2, 3, 4), 0.0), 1, 2, 3, 4)


def test_risk_schedule():
    how = {"alpha": 0.4, "rho": 0.9, "steps": 200, "warmup": 20}
    assert [cal.cvar_count(128, m, **how) for m in (20, 110, 200, 400)] == [128, 90, 52, 52]
    assert cal.lowest(t(3, 1, math.nan, 2), 2).tolist() == [False, True, False, True]
    assert not cal.lowest(t(math.nan), 1).any()


# -- other answers and confidence --------------------------------------------------------------------------------------
def test_demonstrations():
    same(cal.demonstration_matched(t(1), t(3)), -4)
    same(cal.above_initial(t(1), t(3)), -2)


def test_confidence():
    same(cal.confidence_adjusted(t(2, -2), t(0.9, 0.9), mean=0.0, weight=0.5), 2.4, -2.4)
    same(cal.confidence_adjusted(t(2), t(0.9), mean=1.0, weight=0.5, difference=True), 2.2)
    assert cal.running_mean(1.0, t(3, 5)) == pytest.approx(0.1 * 4 + 0.9)
    same(cal.order_preserving(t(1, 2, 4), t(0.2, 0.5, 0.9), 0.4), 1.96, 2.44, 5.16)
    same(cal.confidence_score(t(1), t(0.8)), 0.92)
    # c = .95 and .91 share a bin that is right half of the time
    same(cal.bin_calibrated(t(1, 1, 0), t(0.95, 0.91, 0.1), t(1, 0, 0), weight=2.0), 0.1, 0.18, -0.2)
    same(cal.bin_calibrated(t(1, 1, 0), t(0.95, 0.91, 0.1), t(1, 0, 0), weight=2.0, least=2), 0.1, 0.18, 0)


def test_distributions():
    same(cal.risk_quantile(t(1), t(0), 0.5), 1)
    same(cal.risk_quantile(t(1), t(2 * math.log(2)), 0.158655), -1, tolerance=1e-4)
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    same(cal.angular_similarity(a, b), 1, 0.5, 0.5, tolerance=1e-3)


def test_labels_of_steps():
    outcomes = t(1, 0, 0, 1)
    assert float(cal.step_label(outcomes)) == 1
    assert float(cal.step_label(outcomes, "soft")) == 0.5
    assert float(cal.step_label(outcomes, "entropy", 2.0)) == pytest.approx(0.71689, abs=1e-5)
    same(cal.step_label(torch.tensor([[False, False], [True, False]])), 0, 1)
    same(cal.progress(t(0.5), t(0.2), t(0.6), 0.5), 0.7)
    with pytest.raises(ValueError, match="kind is 'mean'"):
        cal.step_label(outcomes, "mean")


# -- composition -------------------------------------------------------------------------------------------------------
def test_gates():
    same(compose.gated_tokens(0.5, t(0.3, -0.3), weight=5, threshold=0.6), 0, 2.5)
    same(compose.gated_tokens(1.0, t(0.3, -0.3), weight=5, threshold=0.6), 0.3, 4.7)
    same(compose.gated_mix(t(1, 1), t(0, 0), torch.tensor([True, False]), 0.25, -2.0), 0.25, -2)


def test_dense_rewards_keep_the_sum():
    same(compose.spread_by_attention(2.0, t(0.2, 0.3, 0.5), 0.5), 0.2, 0.3, 1.5)
    assert float(compose.spread_by_attention(2.0, t(1, 1, 1, 1)).sum()) == pytest.approx(2.0)
    same(compose.span_rewards(t(1, 2, 4), torch.tensor([1, 3, 1]), 5), 0, 5, 0, 2, 0)


def test_weights_that_follow():
    same(compose.mirror_weights(t(0.5, 0.5), t(1, 0)[:, None], 1.0), 0.2689, 0.7311, tolerance=1e-4)
    same(compose.worst_group(torch.stack([t(1, 2), t(0, 1)])), 0, 1)
    p = torch.tensor([[0.7, 0.3]])
    weights = compose.gradient_norm_weights([p, torch.tensor([[0.0, 1.0]])], [1, 1], torch.ones(1, 4))
    same(weights[:, 0], 1, 0)
    assert float((p - torch.tensor([[0.0, 1.0]])).norm()) == pytest.approx(0.98995, abs=1e-5)
    arms = compose.exp3_probabilities(torch.ones(4), 0.07)
    same(arms, 0.25, 0.25, 0.25, 0.25)
    same(compose.exp3_step(t(1, 1, 1), 0, 1 / 3, gamma=0.07), 1.07251, 1, 1, tolerance=1e-5)
    same(compose.exp3_step(t(1, 1, 1), 3, 0.25), 1, 1, 1)
    same(compose.log_mix(torch.stack([t(1.0), t(0.5)]), t(1, 3)), 0.25 * math.log(1 - 1e-4) + 0.75 * math.log(0.5))


def test_constraints():
    same(compose.lagrangian(t(1, 2), torch.stack([t(0.5, 1.5)]), t(2), t(1)), 2, 1)
    same(compose.multiplier_step(t(0.1, 0.1), torch.stack([t(2, 4), t(0, 0)]), t(1, 1), 0.2), 0.5, 0)


# -- all of them -------------------------------------------------------------------------------------------------------
TRANSFORMS = {
    "length_mean": lambda r, c: cal.length_mean_calibrated(r, 10 * c, 3.0),
    "length_trend": lambda r, c: cal.length_trend_calibrated(r, 10 * c),
    "dropout": lambda r, c: cal.quantile_dropout(r, 0.4),
    "demonstration": lambda r, c: cal.demonstration_matched(r, c),
    "initial": lambda r, c: cal.above_initial(r, c),
    "confidence": lambda r, c: cal.confidence_adjusted(r, c, 0.1),
    "order": lambda r, c: cal.order_preserving(r, c),
    "bins": lambda r, c: cal.bin_calibrated(r, c, (c > 0.5).double()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_order_missing_scores_and_low_precision(name):
    g = torch.Generator().manual_seed(3)
    rewards, other = torch.randn(N, generator=g).double(), torch.rand(N, generator=g).double()
    f, order = TRANSFORMS[name], torch.randperm(N, generator=g)
    assert torch.allclose(f(rewards, other)[order], f(rewards[order], other[order]))
    assert f(rewards.bfloat16(), other.float()).dtype == torch.float32
    rewards[2] = math.nan
    made = f(rewards, other)
    assert made.isnan().nonzero().flatten().tolist() == [2]
    kept = torch.arange(N) != 2
    assert torch.allclose(made[kept], f(rewards[kept], other[kept]))
    alike = f(torch.ones(N).double(), other)
    assert alike.isfinite().all()
    assert f(torch.zeros(0), torch.zeros(0)).shape == (0,)
