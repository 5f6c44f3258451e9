"""The row work in C++ (csrc/): one read of a cache-resident tile, AVX2 or AVX-512 chosen at run time, torch's threads.

The library is optional. It takes its OpenMP from the process that torch has already filled, so that both share one
pool of threads; where that cannot be had, or nothing was compiled, `library()` says why and the torch backend runs.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from fastrl.ops.head import HeadSpec
from fastrl.ops.rows import Law, State

PITCH = 16  # floats: rows of a tile are readable to the next multiple
PART = 64  # words that are folded together (csrc: WORDS): tiles of a multiple give the same bits, however many they are
ABI = 2
ENTROPY, EXTRA = 1, 2
_FLOATS = ctypes.c_void_p


class _Matrix(ctypes.Structure):
    _fields_ = [("at", _FLOATS), ("row", ctypes.c_int64), ("column", ctypes.c_int64)]


class _Head(ctypes.Structure):
    _fields_ = [
        ("logit_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("temperature", ctypes.c_float),
        ("temperatures", _FLOATS),
        ("bias", _FLOATS),
    ]


class _Tile(ctypes.Structure):
    _fields_ = [
        ("raw", _FLOATS),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("first_word", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
    ]


class _State(ctypes.Structure):
    _fields_ = [(n, _FLOATS) for n in ("top", "count", "rest", "weighted", "squares", "at_target", "first")]


class _Law(ctypes.Structure):
    _fields_ = [(n, _FLOATS) for n in ("top", "rise", "fall", "at_target")]
    _fields_ += [("keep", ctypes.c_void_p), ("columns", ctypes.c_int64)]


@functools.cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """(the loaded library or None, its instruction set or why there is none)."""
    found = sorted(Path(__file__).parent.parent.glob("_native*.so"))
    if not found:
        return None, "not compiled: install from source with a C++ compiler (pip install -e .)"
    try:
        lib = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"{found[0].name} does not load: {error}"
    if lib.fastrl_abi() != ABI:
        return None, f"{found[0].name} was compiled from other sources (ABI {lib.fastrl_abi()}, expected {ABI})"
    return declare(lib), lib.fastrl_isa().decode()


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Tells ctypes the signatures of csrc/rows.h and csrc/gemm.h."""
    head, tile, number, wide = ctypes.POINTER(_Head), ctypes.POINTER(_Tile), ctypes.c_int, ctypes.c_int64
    lib.fastrl_isa.restype = ctypes.c_char_p
    lib.fastrl_use_isa.argtypes = [ctypes.c_char_p]
    lib.fastrl_fold.argtypes = [head, tile, ctypes.POINTER(_State), number, number]
    out = (ctypes.c_void_p, ctypes.c_int64)
    lib.fastrl_dlogits.argtypes = [head, tile, ctypes.POINTER(_Law), *out, number]
    matrix = ctypes.POINTER(_Matrix)
    lib.fastrl_gemm.argtypes = [wide, wide, wide, matrix, matrix, ctypes.c_void_p, wide, number, number]
    lib.fastrl_vendor.restype = ctypes.c_char_p
    return lib


class Rows:
    """As rows_torch.Rows, for fp32 tiles on the CPU whose row stride is a multiple of PITCH."""

    def __init__(self, words: int, tokens: int, like: Tensor):
        self.lib = library()[0]
        if self.lib is None:
            raise ValueError(f"backend='native' was asked for but is {library()[1]}; use backend='torch'")

    def fold(
        self, state: State, raw: Tensor, head: HeadSpec, bias: Tensor | None, targets: Tensor, word: int, outputs: tuple
    ) -> State:
        """Updates the state, whose width is a multiple of PITCH, in place and returns it."""
        targets = targets.long().contiguous()
        head_c, alive = _head(head, bias, raw.shape[1])
        flags = ENTROPY * ("entropy" in outputs) + EXTRA * bool({"log_sum_sq_probs", "is_argmax"} & set(outputs))
        record = _State(*(x.data_ptr() for x in state.tensors()))
        if self.lib.fastrl_fold(head_c, _tile(raw, targets, word), record, flags, torch.get_num_threads()):
            raise MemoryError("no memory for the partial statistics of a tile of logits")
        del alive
        return state

    def dlogits(
        self, raw: Tensor, head: HeadSpec, bias: Tensor | None, targets: Tensor, word: int, law: Law,
        keep: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        targets = targets.long().contiguous()
        head_c, alive = _head(head, bias, out.shape[1])
        vectors = [None if x is None else x.contiguous() for x in (law.top, law.rise, law.fall, law.at_target)]
        record = _Law(*(None if x is None else x.data_ptr() for x in vectors))
        record.keep, record.columns = None if keep is None else keep.data_ptr(), out.shape[1]
        tile = _tile(raw, targets, word)
        if self.lib.fastrl_dlogits(head_c, tile, record, out.data_ptr(), out.stride(0), torch.get_num_threads()):
            raise MemoryError("no memory for the kept columns of a tile of logits")
        del alive


def gemm(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out [m, n] = a [m, k] @ b [k, n], or += it, fp32, with the kernel of csrc/gemm_isa.h; returns out.

    a and b of any strides, out's rows contiguous. The bits of an element depend on its row of a and its column of b
    alone, not on m, n or the number of threads.
    """
    (m, k), n = a.shape, b.shape[1]
    left, right = (_Matrix(x.data_ptr(), *x.stride()) for x in (a, b))
    if library()[0].fastrl_gemm(m, n, k, left, right, out.data_ptr(), out.stride(0), add, torch.get_num_threads()):
        raise MemoryError("no memory for the copies that a matrix product reads")
    return out


@functools.cache
def own_gemm() -> bool:
    """Whether `gemm` takes the place of torch's: where it was measured to be faster, and nowhere else.

    torch's GEMM is MKL, whose AVX2 kernels run below the speed of AMD's cores (bench/gemm.py).
    """
    lib = library()[0]
    return lib is not None and lib.fastrl_isa() == b"avx2" and lib.fastrl_vendor() == b"AuthenticAMD"


def _head(head: HeadSpec, bias: Tensor | None, columns: int) -> tuple[_Head, list]:
    """The C record and the tensors that must outlive it; temperatures are padded with 1 to a multiple of PITCH."""
    alive, scalar, rows = [], head.temperature, None
    if isinstance(scalar, Tensor):
        rows = scalar.new_ones(-(-columns // PITCH) * PITCH, dtype=torch.float32)
        rows[:columns] = scalar
        scalar = 1.0
    if bias is not None:
        bias = bias.float().contiguous()
    alive = [rows, bias]
    pointers = (None if x is None else x.data_ptr() for x in alive)
    return _Head(head.logit_scale, head.softcap or 0.0, scalar, *pointers), alive


def _tile(raw: Tensor, targets: Tensor, word: int) -> _Tile:
    return _Tile(raw.data_ptr(), raw.shape[0], raw.shape[1], raw.stride(0), word, targets.data_ptr())
