"""AdamW in slices: float32 arithmetic on a few million elements at a time, whatever weights and states are kept in.

States of 8 or 4 bits, or bfloat16; bfloat16 weights that lose no update. An update below 1/256 of a bfloat16 weight is
lost when the sum is rounded to nearest. Two remedies (Zamirai et al. 2020, arXiv 2010.06192):
    stochastic  round up or down at random so that the expectation is exact
    kahan       keep what rounding cut off in a second bfloat16 and add it the next time: 16 bits of mantissa in all
What is itself added up in bfloat16 would stand still in turn: the second moment, which changes by 1 part in 1000 a step
at beta2 0.999, and Kahan's remainder, where updates are below 1/131072 of a weight. These are rounded randomly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastrl.train.optim.codecs import Codec, Cut, Parts, Writes, codec_of, matrix
from fastrl.train.optim.noise import key_of, noise, round_randomly
from fastrl.train.optim.norm import local, split_over

SLICE = 1 << 22  # elements: some 200 MB of float32 while a slice is worked on
COLUMNS = 1 << 20  # of a slice, a multiple of every block
MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = ("", "_scale")  # a moment's tensors


@dataclass(frozen=True)
class Kept:
    """states: float32, bfloat16, 8bit or 4bit. weights: nearest, stochastic or kahan. seed: of the random rounding."""

    states: str = "float32"
    weights: str = "nearest"
    seed: int = 0


@dataclass(frozen=True)
class Numbers:
    """Of one update of one parameter."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


class SlicedAdamW(torch.optim.Optimizer):
    """Decoupled weight decay, as torch.optim.AdamW; equal to it bit for bit with float32 weights and states.

    State of a parameter: step (int), exp_avg and exp_avg_sq (of 8 and 4 bits also their _scale), compensation (kahan).
    found_inf: None, or a 0-dim tensor: not 0 leaves weights and moments as they are, without a host sync.
    """

    row_states = (*(f"{moment}{key}" for moment in MOMENTS for key in KEYS), "compensation")  # split as weights are

    def __init__(self, groups: list[dict[str, Any]], kept: Kept, **numbers: Any):
        super().__init__(groups, numbers)
        self.kept, self.found_inf = kept, None
        self._step_supports_amp_scaling = True  # torch's name for optimizers that read found_inf
        self._index = {id(p): i for i, p in enumerate(p for g in self.param_groups for p in g["params"])}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: Tensor, group: dict[str, Any]) -> None:
        codecs = {name: codec_of(p, self.kept.states, name == "exp_avg") for name in MOMENTS}
        state, rounding = self.state[p], self.kept.weights if p.dtype is torch.bfloat16 else "nearest"
        if not state:
            state["step"] = 0
            state.update({f"{name}{k}": v for name, codec in codecs.items() for k, v in codec.new(p).items()})
        if rounding == "kahan" and "compensation" not in state:
            state["compensation"] = torch.zeros_like(p)
        state["step"] += 1
        betas, others = group["betas"], {n: group[n] for n in ("lr", "eps", "weight_decay")}
        work = Work(
            weights=matrix(p),
            gradient=matrix(local(p.grad).contiguous()),
            moments={n: (c, {k: state[f"{n}{k}"] for k in KEYS if f"{n}{k}" in state}) for n, c in codecs.items()},
            compensation=matrix(state["compensation"]) if rounding == "kahan" else None,
            rounding=rounding,
            numbers=Numbers(**others, beta1=betas[0], beta2=betas[1], step=state["step"]),
        )
        key, first = key_of(self.kept.seed, state["step"], self._index[id(p)]), first_row(p)
        keep = None if self.found_inf is None else self.found_inf == 0
        for cut in cuts(*work.weights.shape):
            rows = range(first + cut.rows.start, first + cut.rows.stop)
            bits = None
            if rounding != "nearest":
                bits = noise(rows, range(cut.cols.start, cut.cols.stop), key, work.weights.device)
            for where, what in work.update(cut, bits):
                where.copy_(what if keep is None else torch.where(keep, what.to(where.dtype), where))


class AdamWBFloat16(SlicedAdamW):
    """bfloat16 states for bfloat16 weights."""


class AdamW8bit(SlicedAdamW):
    """8-bit states. Classes of their own, since a checkpoint of one is none of another's."""


class AdamW4bit(SlicedAdamW):
    """4-bit states."""


BY_STATES = {"float32": SlicedAdamW, "bfloat16": AdamWBFloat16, "8bit": AdamW8bit, "4bit": AdamW4bit}


@dataclass(frozen=True)
class Work:
    """One update of one parameter. weights, gradient, compensation: [rows, cols] of this rank's part.

    moments: name -> (codec, its parts).
    """

    weights: Tensor
    gradient: Tensor
    moments: dict[str, tuple[Codec, Parts]]
    compensation: Tensor | None
    rounding: str
    numbers: Numbers

    def update(self, cut: Cut, bits: Tensor | None) -> Writes:
        """What to copy where: moments, weights, and what their rounding cut off."""
        n, old = self.numbers, self.weights[cut.rows, cut.cols]
        wide = torch.promote_types(old.dtype, torch.float32)
        g, w = self.gradient[cut.rows, cut.cols].to(wide), old.to(wide, copy=True)
        if self.compensation is not None:
            w += self.compensation[cut.rows, cut.cols]
        (first, m_parts), (second, v_parts) = (self.moments[name] for name in MOMENTS)
        m = first.read(m_parts, cut).to(wide).lerp_(g, 1 - n.beta1)
        v = second.read(v_parts, cut).to(wide).mul_(n.beta2).addcmul_(g, g, value=1 - n.beta2)
        denominator = (v.sqrt() / (1 - n.beta2**n.step) ** 0.5).add_(n.eps)
        w.mul_(1 - n.lr * n.weight_decay).addcdiv_(m, denominator, value=-(n.lr / (1 - n.beta1**n.step)))
        # weights (or their remainder) take the lower half of the noise, the second moment the upper: independent
        low, high = (None, None) if bits is None else (bits & 0xFFFF, (bits >> 16) & 0xFFFF)
        stored = first.write(m_parts, cut, m, None) + second.write(v_parts, cut, v, high)
        if self.rounding == "stochastic":
            return [*stored, (old, round_randomly(w, low))]
        if self.rounding == "kahan":
            new = w.to(old.dtype)
            rest = round_randomly(w - new.to(wide), low)
            return [*stored, (old, new), (self.compensation[cut.rows, cut.cols], rest)]
        return [*stored, (old, w)]


def cuts(rows: int, cols: int) -> Iterator[Cut]:
    """Rectangles of at most SLICE elements that cover [rows, cols]."""
    width = min(cols, COLUMNS)
    height = max(1, SLICE // max(1, width))
    for top in range(0, rows, height):
        for left in range(0, cols, max(1, width)):
            yield Cut(slice(top, min(rows, top + height)), slice(left, min(cols, left + width)))


def first_row(p: Tensor) -> int:
    """The place in the whole parameter of this rank's first row. Raises ValueError if p is not split by rows."""
    if split_over(p) is None:
        return 0
    assert isinstance(p, DTensor)
    dim = next(i for i, placement in enumerate(p.placements) if placement.is_shard())
    if p.placements[dim].dim != 0:
        raise ValueError(f"a parameter split along dimension {p.placements[dim].dim}; rows are what ranks split here")
    # as torch.chunk cuts: every rank the same number but the last ones
    each = -(-p.shape[0] // p.device_mesh.size(dim))
    return min(p.shape[0], each * p.device_mesh.get_local_rank(dim))
