"""Random rounding without a generator: the noise of an element is a hash of (seed, step, parameter, row, column).

So it needs no state, is the same after a resume, and does not depend on how rows are split over ranks or on the order
in which parameters are updated.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = (1 << 64) - 1


def key_of(*numbers: int) -> int:
    """A signed 32-bit key of some integers, by the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    z = 0
    for n in numbers:
        z = (z + n + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        z ^= z >> 31
    return signed(z & 0xFFFFFFFF)


def signed(n: int) -> int:
    """The int32 with these 32 bits."""
    return n - (1 << 32) if n >= 1 << 31 else n


def scramble(x: Tensor) -> Tensor:
    """int32 -> int32, a bijection whose output bits each depend on all input bits (the constants of lowbias32,
    C. Wellons 2018). Shifts are logical: the sign bit is masked away."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * signed(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def noise(rows: range, cols: range, key: int, device: torch.device) -> Tensor:
    """[rows, cols] int32, all 32 bits random; rows and cols are places in the whole parameter."""
    r = torch.arange(rows.start, rows.stop, dtype=torch.int32, device=device)
    c = torch.arange(cols.start, cols.stop, dtype=torch.int32, device=device)
    return scramble(scramble(r + key)[:, None] + c * signed(0x9E3779B9))


def round_randomly(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the expectation x. bits: int32 in [0, 2^16).

    A bfloat16 is the upper half of a float32, and magnitudes are ordered as their bit patterns are: adding a uniform
    16-bit number to the pattern carries into the upper half with probability (lower half) / 2^16.
    """
    return ((x.contiguous().view(torch.int32) + bits) & -0x10000).view(torch.float32).bfloat16()
