"""Bytes of an update or a scoring pass as a function of its tokens, from traces of a few tokens and a few layers.

A trace is a list of births, and the same list whatever the number of tokens and of layers: layer after layer does the
same. What lives at each birth is then a polynomial of degree two in the tokens (one without a quadratic attention) and
of degree one in the layers, found from a few numbers of tokens and two of layers; the peak is the largest of them. In
the middle of the stack what lives moves from one end to the other in equal steps, so that the ends suffice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastrl.train.plan.trace import HEAD, Trace

LAYERS = (2, 3)  # blocks of the traces


@dataclass(frozen=True)
class Moment:
    """What lives at one moment. head: whether the head's workspace is there too."""

    gradients: float
    others: float
    head: bool


@dataclass
class Curve:
    """gradients, others: [births, 3] coefficients of 1, T, T^2. head: [births] bool.

    squares: sum of the squares of the sequences' lengths in the traces, of T^2. exact: births of all were the same.
    """

    gradients: np.ndarray
    others: np.ndarray
    head: np.ndarray
    exact: bool = True
    squares: float = 1.0
    notes: list[str] = field(default_factory=list)

    def at(self, tokens: int, longest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(gradients, others) [births] of T tokens in sequences of at most `longest`: sum of L^2 <= T longest."""
        longest = tokens if longest is None else min(longest, tokens)
        powers = np.array([1.0, tokens, float(tokens) * longest / self.squares])
        return self.gradients @ powers, self.others @ powers

    def peak(self, tokens: int, longest: int | None, workspace: int, gradient_part: float = 1.0) -> Moment:
        """The moment at which most lives. gradient_part: of the gradients, that this device holds (sharding)."""
        gradients, others = self.at(tokens, longest)
        gradients = gradients * gradient_part
        at = int(np.argmax(gradients + others + np.where(self.head, workspace, 0)))
        return Moment(float(gradients[at]), float(others[at]), bool(self.head[at]))

    @property
    def quadratic(self) -> bool:
        """Whether what lives grows with the square of a sequence's length."""
        tokens = 1024.0
        return bool((np.abs(self.others[:, 2]) * tokens > 1e-3 * np.abs(self.others[:, 1]).max()).any())


def fitted(traces: dict[tuple[int, int], Trace], blocks: float) -> Curve:
    """traces: (blocks of layers, tokens) -> Trace, two or three numbers of tokens each; blocks: of the whole model."""
    depths = sorted({d for d, _ in traces})
    tokens = sorted({t for _, t in traces})
    roles = {key: _roles(t, key[0], len(depths) > 1) for key, t in traces.items()}
    names = [n for n in roles[depths[-1], tokens[0]] if all(n in r for r in roles.values())]
    rows_g, rows_o, head, exact = [], [], [], True
    for name in names:
        made = {key: r[name] for key, r in roles.items()}
        if len({x.shape[0] for x in made.values()}) > 1:  # another number of births: only their peaks compare
            made, exact = {key: x[np.argmax(x.sum(1))][None] for key, x in made.items()}, False
        deep = [_deeper([made[d, t] for d in depths], depths, blocks) for t in tokens]
        coefficients = _through(tokens, np.stack(deep))  # [3, births, 2]
        rows_g.append(coefficients[..., 0].T)
        rows_o.append(coefficients[..., 1].T)
        head += [name == HEAD] * coefficients.shape[1]
    return Curve(np.concatenate(rows_g), np.concatenate(rows_o), np.array(head), exact)


def _roles(trace: Trace, depth: int, extrapolate: bool) -> dict[str, np.ndarray]:
    """Segments under names that do not depend on the depth: 0F2 of 3 blocks is 0F-1. [births, 2]."""
    out: dict[str, np.ndarray] = {}
    for segment, made in trace.items():
        values = np.array(made, dtype=float).reshape(-1, 2)
        if segment == "start":  # gradients of earlier micro-batches, one birth a weight
            values = values[-1:]
        kind, at = segment[1:2], segment[2:]
        if not (extrapolate and kind in ("F", "B") and at.isdigit()):
            out[segment] = values
            continue
        i = int(at)
        if i in (0, depth - 1):
            out[f"{segment[:2]}{i if i == 0 else -1}"] = values
    return out


def _deeper(values: list[np.ndarray], depths: list[int], blocks: float) -> np.ndarray:
    if len(depths) == 1:
        return values[0]
    a, b = depths
    return values[0] + (values[1] - values[0]) * (blocks - a) / (b - a)


def _through(tokens: list[int], values: np.ndarray) -> np.ndarray:
    """Coefficients [3, ...] of the line through two values [2, ...], or of the parabola through three."""
    n = len(tokens)
    system = np.vander(np.array(tokens, dtype=float), n, increasing=True)
    made = np.zeros((3, *values.shape[1:]))
    made[:n] = np.linalg.solve(system, values.reshape(n, -1)).reshape(values.shape)
    return made
