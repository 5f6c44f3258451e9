"""Log-softmax over a recorded support (top-p, top-k or grammar sets): gathered dot products, never [N, V]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ops.head import HeadSpec, accumulation_dtype
from fastrl.tokens import TokenStats


def support_statistics(
    head: HeadSpec, hidden: Tensor, targets: Tensor, support: tuple[Tensor, Tensor], outputs: tuple, ignore_index: int
) -> TokenStats:
    """Statistics [N] of softmax restricted to each row's kept tokens; differentiable by autograd.

    support: (indices [nnz], offsets [N+1]); row n keeps indices[offsets[n]:offsets[n+1]]. Cost 2*nnz*H flops and
    nnz*H memory. A target outside its row's support has log-prob -inf; ignored rows give 0.
    """
    indices, offsets = (x.to(hidden.device).long() for x in support)
    n, v = hidden.shape[0], head.weight.shape[0]
    if offsets.shape != (n + 1,):
        raise ValueError(f"support offsets must be [N+1={n + 1}], got {list(offsets.shape)}")
    if int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()):
        raise ValueError(f"support offsets must be ascending from 0, got {offsets.tolist()[:20]}")
    if int(offsets[-1]) != indices.shape[0]:
        raise ValueError(f"support offsets end at {int(offsets[-1])} but indices has {indices.shape[0]} entries")
    if indices.device.type == "cpu" and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < v:
        raise ValueError(f"support indices must be in [0, V={v}), got {int(indices.min())} to {int(indices.max())}")
    row = torch.repeat_interleave(torch.arange(n, device=hidden.device), offsets.diff(), output_size=indices.shape[0])
    keep = targets != ignore_index
    row, indices = row[keep[row]], indices[keep[row]]  # nothing in an ignored row can reach dW, and it costs nothing
    acc = accumulation_dtype(hidden.dtype)
    z = (hidden[row].to(acc) * head.weight[indices].to(acc)).sum(-1)
    if head.bias is not None:
        z = z + head.bias[indices].to(acc)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    z = z / head.row_temperature(row)
    top = z.new_full((n,), -torch.inf).scatter_reduce(0, row, z.detach(), "amax")
    relative = z - top[row]
    total = z.new_zeros(n).index_add(0, row, relative.exp())
    logp = relative - total.log()[row]
    p = logp.exp()
    is_target = indices == targets[row]
    hit = z.new_zeros(n).index_add(0, row, is_target.to(acc)) > 0
    logprobs = z.new_zeros(n).index_add(0, row, torch.where(is_target, logp, torch.zeros_like(logp)))
    made = {
        "logprobs": lambda: torch.where(hit, logprobs, torch.full_like(logprobs, -torch.inf)),
        "entropy": lambda: z.new_zeros(n).index_add(0, row, -p * logp.clamp(min=-1e4)),
        "logsumexp": lambda: top + total.log(),
        "log_sum_sq_probs": lambda: z.new_zeros(n).index_add(0, row, p.square()).log().detach(),
        "is_argmax": lambda: z.new_zeros(n).index_add(0, row, (is_target & (relative == 0)).to(acc)) > 0,
    }
    blank = torch.zeros((), dtype=acc, device=hidden.device)
    return TokenStats(**{m: torch.where(keep, made[m](), blank.to(made[m]().dtype)) for m in outputs})
