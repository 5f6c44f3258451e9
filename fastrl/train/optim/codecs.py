"""How a state of the optimizer is kept: as floats, or as 8- or 4-bit codes with one scale a block of a row.

The codes are torchao's: its quantisers and dynamic maps (Dettmers et al. 2021, arXiv 2110.02861; 4 bits: Li et al.
2023, arXiv 2309.01507). Its own optimizers lay blocks over whatever part of a weight a rank holds, so that their states
depend on the number of ranks; here blocks stay inside a row, and rows are what ranks and checkpoints split.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from fastrl.train.flags import ConfigError
from fastrl.train.optim.noise import round_randomly
from fastrl.train.optim.norm import local

BLOCK = {8: 256, 4: 128}  # values that share a scale
FEWEST = 4096  # smaller parameters keep float32 states, as in bitsandbytes and torchao
SHORTEST = 64  # so do those with shorter rows: their scales would weigh as much as their codes


@dataclass(frozen=True)
class Cut:
    """A rectangle of a parameter seen as [rows, cols]."""

    rows: slice
    cols: slice


Parts = dict[str, Tensor]  # suffix of the state's name -> tensor
Writes = list[tuple[Tensor, Tensor]]  # (where, what)


class Codec(Protocol):
    def new(self, p: Tensor) -> Parts:
        """A state of p that reads as zeros."""

    def read(self, parts: Parts, cut: Cut) -> Tensor:
        """[r, c] in float32 at least, safe to change."""

    def write(self, parts: Parts, cut: Cut, x: Tensor, bits: Tensor | None) -> Writes:
        """What to copy where to keep x [r, c]. bits: noise, for codecs that round randomly."""


def matrix(x: Tensor) -> Tensor:
    """The local part as [rows, the rest], a view. Raises ValueError if it cannot be one."""
    x = local(x)
    if not x.is_contiguous():
        raise ValueError(f"a {list(x.shape)} tensor with strides {x.stride()} has to be contiguous")
    return x.view(x.shape[0], -1) if x.dim() and x.shape[0] else x.view(x.numel(), 1)


def beside(p: Tensor, made: Tensor, trailing: tuple[int, ...]) -> Tensor:
    """`made` [local rows, *trailing] split over the ranks as p is: a DTensor with p's rows where p is one."""
    if not isinstance(p, DTensor):
        return made
    shape = torch.Size((p.shape[0], *trailing))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(made, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


@dataclass(frozen=True)
class Floats:
    """Kept in `dtype`; bfloat16 is rounded randomly where noise comes along."""

    dtype: torch.dtype

    def new(self, p: Tensor) -> Parts:
        return {"": torch.zeros_like(p, dtype=self.dtype, memory_format=torch.preserve_format)}

    def read(self, parts: Parts, cut: Cut) -> Tensor:
        x = matrix(parts[""])[cut.rows, cut.cols]
        return x.to(torch.promote_types(x.dtype, torch.float32), copy=True)

    def write(self, parts: Parts, cut: Cut, x: Tensor, bits: Tensor | None) -> Writes:
        if self.dtype is torch.bfloat16 and bits is not None:
            x = round_randomly(x, bits)
        return [(matrix(parts[""])[cut.rows, cut.cols], x)]


@dataclass(frozen=True)
class Blocks:
    """Codes of `bits` bits with a float32 scale a block. Cuts begin at a block's first column."""

    bits: int
    signed: bool

    def new(self, p: Tensor) -> Parts:
        rows, cols, device = local(p).shape[0], p.numel() // p.shape[0], local(p).device
        width, blocks = -(-cols * self.bits // 8), -(-cols // BLOCK[self.bits])
        codes = torch.zeros((rows, width), dtype=torch.uint8, device=device)
        scale = torch.zeros((rows, blocks), dtype=torch.float32, device=device)
        return {"": beside(p, codes, (width,)), "_scale": beside(p, scale, (blocks,))}

    def read(self, parts: Parts, cut: Cut) -> Tensor:
        tools, (codes, scale) = torchao(), self._views(parts, cut)
        if self.bits == 4:
            codes = torch.stack([codes >> 4, codes & 0b1111], -1).flatten(1)
        padded = F.pad(codes, (0, scale.shape[1] * BLOCK[self.bits] - codes.shape[1])).contiguous()
        x = tools.dequant_with_qmap(padded, levels(self.bits, self.signed, codes.device), scale.reshape(-1))
        return x[:, : cut.cols.stop - cut.cols.start].contiguous()

    def write(self, parts: Parts, cut: Cut, x: Tensor, bits: Tensor | None) -> Writes:
        tools, (codes, scale) = torchao(), self._views(parts, cut)
        block, qmap = BLOCK[self.bits], levels(self.bits, self.signed, x.device)
        padded = F.pad(x.float(), (0, scale.shape[1] * block - x.shape[1])).contiguous()
        scaled, new_scale = tools.scale_tensor(padded, block)
        made = (tools.quantize_8bit_with_qmap if self.bits == 8 else tools.quantize_4bit_with_qmap)(scaled, qmap)
        if self.bits == 4:
            made = (made[:, ::2] << 4) | made[:, 1::2]
        return [(codes, made[:, : codes.shape[1]]), (scale, new_scale.view(scale.shape))]

    def _views(self, parts: Parts, cut: Cut) -> tuple[Tensor, Tensor]:
        block, start, stop = BLOCK[self.bits], cut.cols.start, cut.cols.stop
        bytes_ = slice(start * self.bits // 8, -(-stop * self.bits // 8))
        blocks = slice(start // block, -(-stop // block))
        return local(parts[""])[cut.rows, bytes_], local(parts["_scale"])[cut.rows, blocks]


@lru_cache(maxsize=16)
def levels(bits: int, signed: bool, device: torch.device) -> Tensor:
    """[2^bits] float32, sorted: what the codes stand for. 4 bits unsigned: linear and without 0 (Li et al. 2023)."""
    if bits == 4 and not signed:
        return torch.linspace(0, 1, 17, device=device)[1:]
    make = torchao().create_dynamic_map
    made = make(signed=True, max_exponent_bits=3, total_bits=4) if bits == 4 else make(signed=signed)
    return torch.tensor(made, dtype=torch.float32, device=device)


def torchao():
    """torchao's quantisers. Raises ConfigError if it is not installed."""
    # it warns of CUDA kernels that do not load on this machine; none of them is used here
    logging.getLogger("torchao").addFilter(_not_about_kernels)
    try:
        from torchao.optim import quant_utils
    except ImportError as error:
        raise ConfigError(f"8-bit and 4-bit optimizer states need torchao ({error}); pip install torchao") from None
    return quant_utils


def _not_about_kernels(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Failed to load")


def codec_of(p: Tensor, states: str, signed: bool) -> Codec:
    """How a state of p is kept: float32, bfloat16, 8bit or 4bit. Decided by p's whole shape, so alike on all ranks."""
    rest = p.numel() // p.shape[0] if p.dim() and p.shape[0] else 0
    if states in ("8bit", "4bit") and p.dim() >= 2 and p.numel() >= FEWEST and rest >= SHORTEST:
        return Blocks(int(states[0]), signed)
    if states == "bfloat16" and p.dtype is torch.bfloat16:
        return Floats(torch.bfloat16)
    return Floats(torch.promote_types(p.dtype, torch.float32))
