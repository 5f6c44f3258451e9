"""The cases that are measured, their data, and the truth in float64.

head      loss and both gradients                                           3 GEMMs over N rows
forward   log-probs, no gradient                                            1
frozen    loss and dH; the head's weight asks for no gradient               2
tokens    per-token log-probs under any upstream gradient, both gradients   3 (a recompute makes it 4)
masked    75% of the rows are not trained, scattered                        3 over the N/4 others
zero      75% of the rows have advantage zero: 6 of 8 sequences             3 over the N/4 others
clipped   75% of the tokens are clipped where the surrogate is flat;        1 over N, 2 over the N/4 others
          that is known only after their forward
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

CLIP = 0.2
BETA = 0.05
SEQUENCES = 8
KEPT = 4  # one row in so many is kept in masked, zero and clipped
OLD_NOISE = 0.05  # std of old minus present log-probs: 1 token in 4000 is clipped in the other cases
CHUNK_BYTES = 256 << 20  # of float64 logits at a time, for the truth

GEMMS = {"head": 3, "forward": 1, "frozen": 2, "tokens": 3, "masked": 3, "zero": 3, "clipped": 3}
WHATS = tuple(GEMMS)
LOSSES = {"ppo_clip": "clipped policy loss", "nll": "mean cross-entropy", "dpo": "DPO (no reference)"}
TITLES = {
    "head": "forward + backward",
    "forward": "forward only",
    "frozen": "frozen head (dH only)",
    "tokens": "per-token log-probs, any upstream gradient",
    "masked": "75% of the rows masked",
    "zero": "75% of the rows of zero advantage",
    "clipped": "75% of the tokens clipped",
}


@dataclass(frozen=True)
class Case:
    """What is asked of the head, on what data. Raises ValueError on a combination that does not exist.

    rows N, hidden H, vocabulary V; strategy and backend are fastrl's keywords (None: its own choice).
    """

    what: str = "head"
    loss: str = "ppo_clip"
    rows: int = 256
    hidden: int = 256
    vocabulary: int = 16384
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0
    strategy: str | None = None
    backend: str | None = None

    def __post_init__(self):
        if self.what not in WHATS:
            raise ValueError(f"what is {self.what!r}; expected one of {', '.join(WHATS)}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss is {self.loss!r}; expected one of {', '.join(LOSSES)}")
        if self.rows < SEQUENCES * KEPT or self.rows % (SEQUENCES * KEPT):
            raise ValueError(f"rows is {self.rows}; expected a positive multiple of {SEQUENCES * KEPT} (8 sequences)")
        if self.hidden < 1 or self.vocabulary < 2:
            raise ValueError(f"hidden is {self.hidden}, vocabulary {self.vocabulary}; expected at least 1 and 2")
        if self.loss not in losses_of(self.what):
            raise ValueError(f"what='{self.what}' is about advantages; it needs loss='ppo_clip', not {self.loss!r}")

    @property
    def gemm_rows(self) -> tuple[int, int, int]:
        """Rows of the GEMMs h W^T, dZ W and dZ^T h that no method can do without."""
        n, k = self.rows, self.rows // KEPT
        forward = k if self.what in ("masked", "zero") else n
        backward = k if self.what in ("masked", "zero", "clipped") else n
        wants_hidden, wants_weight = self.what != "forward", self.what not in ("forward", "frozen")
        return forward, backward * wants_hidden, backward * wants_weight

    @property
    def flop(self) -> int:
        return 2 * sum(self.gemm_rows) * self.hidden * self.vocabulary

    @property
    def title(self) -> str:
        law = "" if self.what in ("forward", "tokens") else f"{LOSSES[self.loss]}, "
        return f"{law}{TITLES[self.what]}, N={self.rows} D={self.hidden} V={self.vocabulary} {self.dtype}"


def losses_of(what: str) -> tuple[str, ...]:
    """Advantages and clipping exist in the policy loss only; half-masked pairs are no DPO."""
    return {"zero": ("ppo_clip",), "clipped": ("ppo_clip",), "masked": ("ppo_clip", "nll")}.get(what, tuple(LOSSES))


@dataclass(frozen=True)
class Data:
    """hidden [N, H], weight [V, H], targets [N], logprobs [N] float64: one per shape, shared by its cases."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    logprobs: Tensor


@dataclass(frozen=True)
class Problem:
    """Data and what the law reads. mask [N] bool, advantages [SEQUENCES], old_logprobs [N], upstream [N]."""

    case: Case
    data: Data
    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    upstream: Tensor

    def leaves(self) -> tuple[Tensor, Tensor]:
        """hidden and weight, fresh, asking for the gradients that the case is about."""
        what, data = self.case.what, self.data
        weight = data.weight.detach().requires_grad_(what not in ("forward", "frozen"))
        return data.hidden.detach().requires_grad_(what != "forward"), weight

    @property
    def labels(self) -> Tensor:
        """targets, -100 in the rows that are not trained."""
        return self.data.targets.where(self.mask, -100)

    @property
    def active(self) -> Tensor:
        """[N] rows whose log-prob everybody must get right: not masked, advantage not zero."""
        return self.mask & (self.token_advantages != 0) if self.case.what == "zero" else self.mask

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(self.case.rows // SEQUENCES)

    @property
    def clipped(self) -> float:
        """Share of the tokens whose surrogate is flat."""
        ratio = (self.data.logprobs - self.old_logprobs.double()).exp()
        up = self.token_advantages > 0
        return (up & (ratio > 1 + CLIP) | ~up & (ratio < 1 - CLIP)).float().mean().item()


# -- data --------------------------------------------------------------------------------------------------------------
def make_data(case: Case) -> Data:
    """Random hidden states and head with logits of standard deviation 2, made on the case's device."""
    dtype, make = getattr(torch, case.dtype), torch.Generator(case.device).manual_seed(case.seed)
    hidden = torch.randn(case.rows, case.hidden, generator=make, device=case.device).to(dtype)
    weight = torch.randn(case.vocabulary, case.hidden, generator=make, device=case.device)
    weight = weight.mul_(2 / case.hidden**0.5).to(dtype)
    targets = torch.randint(case.vocabulary, (case.rows,), generator=make, device=case.device)
    return Data(hidden, weight, targets, logprobs64(hidden, weight, targets))


def make_problem(case: Case, data: Data) -> Problem:
    """The same tensors of data; mask, advantages and old log-probs as the case wants them."""
    n = case.rows
    make = torch.Generator().manual_seed(case.seed + 1)
    advantages = torch.randn(SEQUENCES, generator=make)
    noise = OLD_NOISE * torch.randn(n, generator=make)
    upstream = torch.randn(n, generator=make) / n
    kept = torch.zeros(n, dtype=torch.bool)
    kept[torch.randperm(n, generator=make)[: n // KEPT]] = True
    mask = kept if case.what == "masked" else torch.ones(n, dtype=torch.bool)
    if case.what == "zero":
        advantages[: SEQUENCES - SEQUENCES // KEPT] = 0.0
    # No token within float error of a clip edge: which branch it takes must not depend on rounding.
    noise[((-noise).exp().sub(1).abs() - CLIP).abs() < 1e-3] = 0.0
    if case.what == "clipped":
        noise.clamp_(-0.1, 0.1)
        # ratio exp(-noise) at 1.5 where the advantage is positive, at 1/1.5 where it is negative: the flat sides.
        side = torch.sign(advantages).repeat_interleave(n // SEQUENCES) * -torch.tensor(1.5).log()
        noise = torch.where(kept, noise, side)
    old = (data.logprobs.cpu() + noise).float()
    return Problem(case, data, *(x.to(case.device) for x in (mask, advantages, old, upstream)))


# -- the law and the truth ---------------------------------------------------------------------------------------------
def mean_loss(logprobs: Tensor, problem: Problem) -> Tensor:
    """The law itself, from log-probs [N] of any dtype: a mean over trained tokens, or over pairs for DPO."""
    if problem.case.what == "tokens":
        return logprobs.mul(problem.upstream.to(logprobs.dtype)).sum()
    if problem.case.loss == "dpo":
        chosen, rejected = logprobs.view(SEQUENCES // 2, 2, -1).sum(-1).unbind(1)
        return -logsigmoid(BETA * (chosen - rejected)).mean()
    if problem.case.loss == "nll":
        value = -logprobs
    else:
        advantages = problem.token_advantages.to(logprobs.dtype)
        ratio = (logprobs - problem.old_logprobs.to(logprobs.dtype)).exp()
        value = -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return value.where(problem.mask, 0.0).sum() / problem.mask.sum()


def _chunk(data_or_weight: Tensor) -> int:
    return max(1, CHUNK_BYTES // (8 * data_or_weight.shape[0]))


def logprobs64(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """[N] float64, in chunks of rows."""
    head, parts = weight.double().t(), []
    for h, y in zip(hidden.split(_chunk(weight)), targets.split(_chunk(weight)), strict=True):
        parts.append(torch.log_softmax(h.double() @ head, 1).gather(1, y.unsqueeze(1)).squeeze(1))
    return torch.cat(parts)


def truth64(problem: Problem) -> dict[str, Tensor]:
    """{logprobs [N], d_hidden, d_weight} float64: dL/dlogp by autograd on [N], then dZ = c (onehot - p) row by row."""
    data = problem.data
    if problem.case.what == "forward":
        return {"logprobs": data.logprobs}
    logprobs = data.logprobs.detach().requires_grad_()
    (coefficient,) = torch.autograd.grad(mean_loss(logprobs, problem), logprobs)
    weight = data.weight.double()
    d_hidden, d_weight, step = [], torch.zeros_like(weight), _chunk(weight)
    for h, y, c in zip(*(x.split(step) for x in (data.hidden, data.targets, coefficient)), strict=True):
        d_logits = torch.softmax(h.double() @ weight.t(), 1).neg_()
        d_logits.scatter_add_(1, y.unsqueeze(1), torch.ones_like(c).unsqueeze(1))
        d_logits.mul_(c.unsqueeze(1))
        d_hidden.append(d_logits @ weight)
        d_weight.addmm_(d_logits.t(), h.double())
    truth = {"logprobs": logprobs.detach(), "d_hidden": torch.cat(d_hidden), "d_weight": d_weight}
    return {name: x for name, x in truth.items() if name != "d_weight" or problem.case.what != "frozen"}


def tiny(case: Case) -> Case:
    """The same case at a shape that costs nothing: to touch every code path before a measured call."""
    return replace(case, rows=64, hidden=64, vocabulary=512)
