"""Sums over the sequences of a packed batch, and DPO's pair logits: deterministic on the GPU, linear, differentiable.

    segment_sum_s = sum_{t in s} x_t          adjoint: spread, every row of s gets g_s
    pair_logits_p = beta ((pi - ref)(chosen) - (pi - ref)(rejected))     adjoint: +-beta g_p on the rows of the pair
Each Function's backward is the other's forward, so that derivatives of any order are right.
The definitions: fastrl.tokens.segment_sum and segment_mean, fastrl.losses.preference.DPO.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ops import dispatch


def segment_sum(values: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """[T] -> [S] sums of values over each sequence, in the dtype of values; an empty sequence gives 0.

    Args: values: [T] float. cu_seqlens: [S+1] int32 or int64, ascending from 0 to T. backend: None (the kernel on a
        GPU), "torch", "reference" or "triton".
    Raises: ValueError, TypeError on vectors that do not fit.
    """
    return _Sum.apply(values, _checked(values, cu_seqlens), False, _use_kernel(backend, values))


def segment_mean(values: Tensor, cu_seqlens: Tensor, *, backend: str | None = None) -> Tensor:
    """[T] -> [S] means over each sequence; an empty sequence gives 0. As segment_sum otherwise."""
    return _Sum.apply(values, _checked(values, cu_seqlens), True, _use_kernel(backend, values))


def pair_logits(
    logprobs: Tensor, ref_logprobs: Tensor | None, cu_seqlens: Tensor, beta: float, *, backend: str | None = None
) -> Tensor:
    """[P] logits of DPO (Rafailov et al. 2023, eq. 7): beta ((pi - ref)(chosen) - (pi - ref)(rejected)).

    Args: logprobs: [T] float, differentiable. ref_logprobs: [T] or None for log ref = 0; no gradient flows to it.
        cu_seqlens: [2P+1] int, sequences 2p and 2p+1 are chosen and rejected. beta: the KL strength (1/nats).
    Returns: float32 (float64 for float64). Raises: ValueError, TypeError on what does not fit.
    """
    cu_seqlens = _checked(logprobs, cu_seqlens)
    if ref_logprobs is not None:
        if ref_logprobs.shape != logprobs.shape:
            shapes = f"ref_logprobs is {list(ref_logprobs.shape)} but logprobs is {list(logprobs.shape)}"
            raise ValueError(f"{shapes}; expected [T] both")
        ref_logprobs = ref_logprobs.detach()
    if cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(f"pairs are interleaved chosen, rejected: got an odd {cu_seqlens.shape[0] - 1} sequences")
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    logprobs = logprobs.to(dtype)
    ref = None if ref_logprobs is None else ref_logprobs.to(dtype)
    return _Pairs.apply(logprobs, ref, cu_seqlens, float(beta), _use_kernel(backend, logprobs))


# -- adjoint pairs -----------------------------------------------------------------------------------------------------
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, cu, mean: bool, kernel: bool):
        ctx.save_for_backward(cu)
        ctx.rest = mean, kernel, values.shape[0]
        if kernel:
            from fastrl.kernels import segments

            with torch.cuda.device_of(values):
                return segments.segment_sum(values, cu, mean=mean)
        sums = values.new_zeros(len(cu) - 1).index_add(0, _ids(cu, len(values)), values)
        return sums / cu.diff().clamp(min=1) if mean else sums

    @staticmethod
    def backward(ctx, upstream):
        mean, kernel, length = ctx.rest
        return _Spread.apply(upstream, ctx.saved_tensors[0], mean, kernel, length), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, per_segment, cu, mean: bool, kernel: bool, length: int):
        ctx.save_for_backward(cu)
        ctx.rest = mean, kernel
        if kernel:
            from fastrl.kernels import segments

            with torch.cuda.device_of(per_segment):
                return segments.segment_spread(per_segment, cu, length, mean=mean)
        return (per_segment / cu.diff().clamp(min=1) if mean else per_segment)[_ids(cu, length)]

    @staticmethod
    def backward(ctx, upstream):
        return _Sum.apply(upstream, ctx.saved_tensors[0], *ctx.rest), None, None, None, None


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, ref, cu, beta: float, kernel: bool):
        ctx.save_for_backward(cu)
        ctx.rest = beta, kernel, logprobs.shape[0]
        if kernel:
            from fastrl.kernels import segments

            with torch.cuda.device_of(logprobs):
                return segments.pair_logits(logprobs, ref, cu, beta)[0]
        gains = logprobs if ref is None else logprobs - ref
        sums = gains.new_zeros(len(cu) - 1).index_add(0, _ids(cu, len(gains)), gains)
        return beta * (sums[0::2] - sums[1::2])

    @staticmethod
    def backward(ctx, upstream):
        return _PairCoefficients.apply(upstream, ctx.saved_tensors[0], *ctx.rest), None, None, None, None


class _PairCoefficients(torch.autograd.Function):
    """[P] dL/dlogit -> [T] c_t = dL/dlogp_t."""

    @staticmethod
    def forward(ctx, per_pair, cu, beta: float, kernel: bool, length: int):
        ctx.save_for_backward(cu)
        ctx.rest = beta, kernel
        if kernel:
            from fastrl.kernels import segments

            with torch.cuda.device_of(per_pair):
                return segments.pair_coefficients(per_pair, cu, length, beta)
        signed = torch.stack([per_pair, -per_pair], 1).reshape(-1) * beta
        return signed[_ids(cu, length)]

    @staticmethod
    def backward(ctx, upstream):
        return _Pairs.apply(upstream, None, ctx.saved_tensors[0], *ctx.rest), None, None, None, None


# -- at the door -------------------------------------------------------------------------------------------------------
def _ids(cu: Tensor, length: int) -> Tensor:
    """[T] which sequence each row belongs to."""
    return torch.repeat_interleave(torch.arange(len(cu) - 1, device=cu.device), cu.diff().long(), output_size=length)


def _use_kernel(backend: str | None, x: Tensor) -> bool:
    return dispatch.pick(backend, x) == "triton"


def _checked(values: Tensor, cu: Tensor) -> Tensor:
    """cu_seqlens, its numbers looked at on the CPU, where that waits for nothing."""
    if values.dim() != 1 or not values.is_floating_point():
        raise ValueError(f"values must be a float [T] vector, got {list(values.shape)} {values.dtype}")
    if cu.dim() != 1 or cu.numel() < 1:
        raise ValueError(f"cu_seqlens must be [S+1], got {list(cu.shape)}")
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be int32 or int64, got {cu.dtype}; cast it with .int()")
    if cu.device != values.device:
        raise ValueError(f"cu_seqlens is on {cu.device} but values is on {values.device}; move one of them")
    t = values.shape[0]
    if cu.device.type == "cpu" and (int(cu[0]) != 0 or int(cu[-1]) != t or bool((cu.diff() < 0).any())):
        raise ValueError(f"cu_seqlens must ascend from 0 to T={t}, the length of values; got {cu.tolist()[:20]}")
    return cu
