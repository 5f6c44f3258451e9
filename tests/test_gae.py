"""GAE: the plain law against eq. 16 of Schulman et al. 2016 summed as written, and the scan kernel against both."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import assert_as_accurate, assert_same
from test_triton import DEVICE, Tampered

pytest.importorskip("triton")
from fastrl import advantages  # noqa: E402
from fastrl.kernels import gae as kernels  # noqa: E402
from fastrl.kernels import tiles  # noqa: E402
from fastrl.ops import scan  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BLOCK = tiles.VECTORS["interpreter"].columns
LENGTHS = (0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 9, 0, 5, 0)
BACKENDS = ["torch", "triton"]


@dataclass
class Episode:
    """One packed batch. rewards, values: [T]; cu [S+1]; mask [T] or None; bootstrap [S] or None."""

    rewards: torch.Tensor
    values: torch.Tensor
    cu: torch.Tensor
    mask: torch.Tensor | None = None
    bootstrap: torch.Tensor | None = None
    gamma: float = 0.97
    lam: float = 0.9


def episode(lengths=LENGTHS, seed=0, share=0.6, dtype=torch.float32, **how) -> Episode:
    g = torch.Generator().manual_seed(seed)
    t, s = sum(lengths), len(lengths)
    draw = lambda n: torch.randn(n, generator=g).to(dtype).to(DEVICE)  # noqa: E731
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    mask = (torch.rand(t, generator=g) < share).to(DEVICE) if share < 1 else None
    return replace(Episode(draw(t), draw(t), cu, mask, draw(s)), **how)


def run(e: Episode, backend: str):
    return scan.gae(
        e.rewards, e.values, e.cu, gamma=e.gamma, lam=e.lam, mask=e.mask, bootstrap=e.bootstrap, backend=backend
    )


def by_definition(e: Episode, dtype=torch.float64):
    """A_t = sum_l (gamma lam)^l delta_{t+l} over the actions of the sequence, from the last one back, in dtype."""
    made = torch.zeros(2, len(e.rewards), dtype=dtype)
    number = lambda x: torch.tensor(x, dtype=dtype)  # noqa: E731
    gamma, decay = number(e.gamma), number(e.gamma) * number(e.lam)
    r, v = e.rewards.cpu().to(dtype), e.values.cpu().to(dtype)
    for s, (a, b) in enumerate(zip(e.cu.tolist(), e.cu.tolist()[1:], strict=False)):
        acts = [t for t in range(a, b) if e.mask is None or bool(e.mask[t])]
        v_next = number(0.0) if e.bootstrap is None else e.bootstrap[s].cpu().to(dtype)
        total = number(0.0)
        for t in reversed(acts):
            total = r[t] + gamma * v_next - v[t] + decay * total
            v_next = v[t]
            made[0, t], made[1, t] = total, total + v[t]
    return made[0].to(DEVICE), made[1].to(DEVICE)


def check(e: Episode, backend: str) -> None:
    ours = run(e, backend)
    for name, x, plain, truth in zip(
        ("advantages", "returns"), ours, by_definition(e, torch.float32), by_definition(e), strict=True
    ):
        assert x.dtype == torch.float32 and not x.requires_grad
        assert_as_accurate(name, x, plain, truth, 1.5)
        if e.mask is not None:
            assert not x[~e.mask].any()


# -- values ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma,lam", [(0.97, 0.9), (1.0, 1.0), (1.0, 0.95), (0.9, 0.0), (0.0, 0.5), (0.9999, 1.0)])
def test_against_the_definition(gamma, lam, backend):
    check(episode(gamma=gamma, lam=lam), backend)
    check(episode(gamma=gamma, lam=lam, share=1.0, seed=1, bootstrap=None), backend)


def test_the_plain_law_in_float64():
    for how in ({}, {"mask": None}, {"bootstrap": None}):
        e = episode(dtype=torch.float64, **how)
        for ours, truth in zip(run(e, "torch"), by_definition(e), strict=True):
            assert ours.dtype == torch.float64
            assert_same("gae", ours, truth, 1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_cases_known_by_heart(backend):
    e = episode(gamma=1.0, lam=1.0, share=1.0, lengths=(3, 7, 1), bootstrap=None)
    advantages_, returns = run(e, backend)
    for a, b in ((0, 3), (3, 10), (10, 11)):  # Monte Carlo: the return is the sum of what is still to come
        togo = e.rewards[a:b].flip(0).cumsum(0).flip(0)
        assert_same("returns", returns[a:b], togo, 1e-6)
        assert_same("advantages", advantages_[a:b], togo - e.values[a:b], 1e-6)
    one_step = run(replace(e, lam=0.0, gamma=0.5), backend)[0]
    assert_same("td", one_step[3:9], e.rewards[3:9] + 0.5 * e.values[4:10] - e.values[3:9], 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_memory_keeps_its_digits(backend):
    """gamma lam = 1 - 1e-5: rounding that number to float32 alone is an error of 1e-3 of its distance to 1."""
    e = episode(lengths=(9 * BLOCK,), share=1.0, gamma=1 - 1e-5, lam=1.0)
    e.rewards.abs_()
    for ours, truth in zip(run(e, backend), by_definition(e), strict=True):
        assert_same("gae", ours, truth, 1.2e-7)


# -- tokens that are no actions ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_recurrence_jumps_across_gaps(backend):
    """The advantages of the actions are those of the actions laid end to end, wherever the gaps are."""
    e = episode(lengths=(3 * BLOCK + 11, BLOCK))
    mask = torch.ones_like(e.rewards, dtype=torch.bool)
    mask[BLOCK - 3 : 2 * BLOCK + 4] = False  # a whole block and more
    mask[3 * BLOCK + 5 : 3 * BLOCK + 11] = False  # the end of a sequence
    mask[3 * BLOCK + 11 : 3 * BLOCK + 14] = False  # the start of the next
    e.mask = mask
    check(e, backend)
    ends = torch.nn.functional.pad(mask.long().cumsum(0), (1, 0))[e.cu.long()]
    short = replace(e, rewards=e.rewards[mask], values=e.values[mask], cu=ends, mask=None)
    for ours, truth in zip(run(e, backend), run(short, backend), strict=True):
        assert_same("gae", ours[mask], truth, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_a_skipped_token_is_read(backend):
    e = episode()
    clean = run(e, backend)
    e.rewards[~e.mask], e.values[~e.mask] = math.nan, math.inf
    assert all(torch.equal(a, b) for a, b in zip(run(e, backend), clean, strict=True))
    e.mask[:] = False
    assert not any(x.any() for x in run(e, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_stays_in_its_sequence_and_before_its_token(bad, backend):
    e = episode(lengths=(20, 30, 25), share=1.0)
    clean = run(e, backend)
    e.rewards[35] = bad
    ours = run(e, backend)
    reached = torch.zeros(75, dtype=torch.bool, device=DEVICE)
    reached[20:36] = True
    for x, y in zip(ours, clean, strict=True):
        assert not x[reached].isfinite().any() and torch.equal(x[~reached], y[~reached])


# -- inputs ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    for lengths in ((), (0,), (0, 0)):
        a, r = run(episode(lengths=lengths), backend)
        assert a.shape == r.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_half_precision_and_graph_carrying_inputs(backend):
    e = episode(dtype=torch.bfloat16)
    wide = replace(e, rewards=e.rewards.float(), values=e.values.float(), bootstrap=e.bootstrap.float())
    truth = run(wide, backend)
    assert all(torch.equal(a, b) for a, b in zip(run(e, backend), truth, strict=True))
    pair = torch.stack([wide.rewards, wide.values], 1)
    mask = torch.stack([e.mask, ~e.mask], 1)
    strided = replace(wide, rewards=pair[:, 0], values=pair[:, 1].requires_grad_(), mask=mask[:, 0], cu=e.cu.long())
    for ours, other in zip(run(strided, backend), truth, strict=True):
        assert torch.equal(ours, other) and not ours.requires_grad
    flat = replace(wide, rewards=wide.rewards[:1].expand(len(e.rewards)))
    check(flat, backend)


@pytest.mark.parametrize("call", [advantages.gae, scan.gae])
def test_refusals(call):
    e = episode(lengths=(3, 4), share=1.0)
    good = dict(rewards=e.rewards, values=e.values, cu_seqlens=e.cu, gamma=0.9, lam=0.9)
    cases = [
        (ValueError, r"gamma must be in \[0, 1\], got 1.1", {"gamma": 1.1}),
        (ValueError, r"lam must be in \[0, 1\], got nan", {"lam": math.nan}),
        (ValueError, r"float \[T\], got rewards \[7, 1\]", {"rewards": e.rewards[:, None]}),
        (ValueError, "float .T., got .*int64", {"values": e.values.long()}),
        (ValueError, r"values must be \[T=7\], got \[6\]", {"values": e.values[1:]}),
        (ValueError, r"bootstrap must be \[S=2\], got \[3\]", {"bootstrap": e.values[:3]}),
        (TypeError, "mask must be bool", {"mask": e.values}),
        (ValueError, "cu_seqlens must be int32 or int64", {"cu_seqlens": e.cu.float()}),
    ]
    if DEVICE == "cpu":
        cases.append((ValueError, "ascend from 0 to T=7", {"cu_seqlens": e.cu - 1}))
    for kind, match, wrong in cases:
        with pytest.raises(kind, match=match):
            call(**{**good, **wrong})
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        scan.gae(**good, backend="cuda")
    with pytest.raises(ValueError, match=r"mask is \[3\]; expected \[7\]"):
        kernels.gae(e.rewards, e.values, e.cu, 1.0, 1.0, mask=e.values[:3] > 0)


# -- planted mistakes --------------------------------------------------------------------------------------------------
def kernel(change):
    return "triton", lambda m: m.setattr(kernels, "gae_kernel", Tampered(kernels.gae_kernel, change))


def plain(change):
    own, home = advantages.reverse_scan, advantages.returns
    return "torch", lambda m: m.setattr(home, "reverse_scan", lambda a, b, longest: own(*change(a, b, longest)))


MUTANTS = {
    "lambda forgotten": kernel(lambda n: {"decay": n["gamma"], "decay_rest": n["gamma_rest"]}),
    "no discount of the next value": kernel(lambda n: {"gamma": 1.0, "gamma_rest": 0.0}),
    "the mask is not looked at": kernel(lambda n: {"actions": None}),
    "sequences end in nothing": kernel(lambda n: {"bootstrap": None}),
    "bootstrap of the neighbour": kernel(lambda n: {"bootstrap": n["bootstrap"].roll(1)}),
    "last token dropped": kernel(lambda n: {"bounds": n["bounds"].clamp(max=int(n["bounds"][-1]) - 1)}),
    "rewards from one step later": kernel(lambda n: {"rewards": n["rewards"].roll(-1)}),
    "scan too short": plain(lambda a, b, longest: (a, b, longest // 16)),
    "sequences run into each other": plain(lambda a, b, longest: (torch.full_like(a, float(a.max())), b, longest)),
}


@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_a_planted_mistake_is_noticed(mutant, monkeypatch):
    e = episode()
    e.mask[-1] = True
    if mutant is None:
        for backend in BACKENDS:
            check(e, backend)
        return
    backend, plant = MUTANTS[mutant]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(e, backend)
