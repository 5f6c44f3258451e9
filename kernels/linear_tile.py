"""Device functions shared by the linear kernels: one tile of hidden @ weight.T, and the order in which tiles run."""

import triton
import triton.language as tl


@triton.jit
def grouped(pid, blocks, ranges, GROUP: tl.constexpr):
    """Program id -> (row block, column range). GROUP row blocks walk the ranges together, so that a weight tile is
    fetched once per group and the group's hidden rows stay in L2."""
    group = pid // (GROUP * ranges)
    height = tl.minimum(blocks - group * GROUP, GROUP)
    within = pid % (GROUP * ranges)
    return group * GROUP + within % height, within // height


@triton.jit
def project_tile(
    hidden, weight, n0, v0, N, V, H, stride_hn, stride_hk, stride_wv, stride_wk,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Raw logits hidden[n0:, :] @ weight[v0:, :].T in fp32. Rows and columns past the end hold anything.

    WIDEN is for the interpreter, whose dot reads bfloat16 as integers; products of bfloat16 are exact in fp32."""
    acc = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if TMA:
        for k in range(0, H, BLOCK_K):
            a = hidden.load([n0, k])
            b = weight.load([v0, k])
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
    else:
        # Clamped instead of masked: a repeated last row is read in bounds and never used.
        rows = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        cols = tl.minimum(v0 + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        ks = tl.arange(0, BLOCK_K)
        a_ptr = hidden + rows[:, None] * stride_hn + ks[None, :].to(tl.int64) * stride_hk
        b_ptr = weight + cols[None, :] * stride_wv + ks[:, None].to(tl.int64) * stride_wk
        for k in range(0, H, BLOCK_K):
            if EVEN_K:
                a = tl.load(a_ptr)
                b = tl.load(b_ptr)
            else:
                a = tl.load(a_ptr, mask=ks[None, :] < H - k, other=0.0)
                b = tl.load(b_ptr, mask=ks[:, None] < H - k, other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            a_ptr += tl.cast(stride_hk, tl.int64) * BLOCK_K
            b_ptr += tl.cast(stride_wk, tl.int64) * BLOCK_K
    return acc


@triton.jit
def halve(x):
    """[R, C] -> its left and its right half, [R, C / 2] each; stays in registers."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def cut_columns(x, PARTS: tl.constexpr):
    """[R, C] -> tuple of PARTS (1, 2, 4 or 8) column ranges, left to right. The epilogue takes them one by one, so
    that its temporaries are a fraction of the accumulator and nothing spills."""
    if tl.constexpr(PARTS == 1):
        return (x,)
    elif tl.constexpr(PARTS == 2):
        return halve(x)
    else:
        left, right = halve(x)
        return cut_columns(left, PARTS // 2) + cut_columns(right, PARTS // 2)
