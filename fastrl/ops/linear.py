"""linear_logprobs and linear_cross_entropy: per-token statistics of a linear head, logits never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ops import custom, dispatch, reference
from fastrl.ops.checks import autocast_off, check_inputs, check_targets, head_spec, settle_dtypes
from fastrl.ops.custom import DIFFERENTIABLE, Call
from fastrl.ops.head import HeadSpec
from fastrl.tokens import STAT_NAMES, TokenStats


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = ("logprobs",),
    support: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
    strategy: str | None = None,
    workspace_bytes: int | None = None,
    batch_invariant: bool = False,
    process_group=None,
    debug_checks: bool = False,
) -> TokenStats:
    """Per-token statistics of softmax(z), z = softcap*tanh(logit_scale*(h.W + b)/softcap) / temperature.

    No [N, V] tensor is formed: at most `workspace_bytes` of logits exist at a time. The forward is 1 GEMM; the backward
    takes 2 more, 1 with a frozen head, and part of another one for the logits that were not kept (see `strategy`).
    Rows whose upstream gradient is zero are dropped from all of them.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64; any strides.
        weight: [V, H], same dtype and device. bias: [V] or None.
        targets: [...] int32/int64, the token predicted from hidden[...]; rows equal to ignore_index give 0 in every
            output and no gradient. Out of [0, V): ValueError on the CPU (and anywhere with debug_checks), NaN on CUDA.
        temperature: positive float, or [...] one per token (not differentiated).
        logit_scale, softcap: the model's own logit transform (Cohere, Granite; Gemma).
        outputs: any of logprobs, entropy, logsumexp, log_sum_sq_probs, is_argmax.
        support: (indices [nnz] int, offsets [N+1] int): log-softmax over each row's kept tokens only.
        backend: None (by device), "reference", "torch", "native" (CPU, compiled) or "triton".
        strategy: None, or by name "two_pass" (the backward makes all logits again), "cached" (keeps those that fit the
            workspace from forward to backward; the default on the CPU), "frozen" (a frozen head and log-probs alone:
            dlogprob/dhidden is made in the forward, [N, H] more memory) or "forward" (no backward).
        workspace_bytes: bytes of logits that may exist at once.
        batch_invariant: a row's statistics are the same bits whatever other rows stand around it, however many they
            are and wherever it stands. Slower: every GEMM of the forward has one fixed shape.
        process_group: ranks over which the vocabulary is cut, in rank order: weight and bias are this rank's words,
            hidden, targets and the results are the same on every rank (targets number the whole vocabulary). dW and db
            are of this rank's words, dH is summed over the ranks.

    Returns:
        TokenStats with [...] fields, float32 (float64 for float64 input), None where not asked for. logprobs, entropy
        and logsumexp are differentiable with arbitrary per-token upstream gradients in hidden, weight and bias; frozen
        inputs cost nothing. A second backward through the gradients raises RuntimeError.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit, naming both sides.
    """
    hidden, weight = settle_dtypes(hidden, weight)
    check_inputs(hidden, weight, targets, bias)
    outputs = _known(outputs)
    head = head_spec(weight, bias, temperature, logit_scale, softcap, hidden)
    shape, flat = targets.shape, targets.reshape(-1)
    h = hidden.reshape(-1, hidden.shape[-1])
    if support is not None:
        if process_group is not None:
            raise ValueError("support= and process_group= do not go together: kept words would lie on several ranks")
        from fastrl.ops.support import support_statistics

        how = dict(backend=backend, workspace_bytes=workspace_bytes)
        return support_statistics(head, h, flat, support, outputs, ignore_index, **how).map(lambda x: x.reshape(shape))
    how = dict(
        backend=backend, strategy=strategy, workspace_bytes=workspace_bytes, ignore_index=ignore_index,
        batch_invariant=batch_invariant, process_group=process_group, debug_checks=debug_checks,
    )  # fmt: skip
    return head_statistics(head, h, flat, outputs, **how).map(lambda x: x.reshape(shape))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    **head_options,
) -> Tensor:
    """torch.nn.functional.cross_entropy of h.W + b without the logits, plus z_loss * logsumexp^2.

    Args: as linear_logprobs; reduction "mean" (over rows not ignored), "sum" or "none" ([...]).
        label_smoothing in [0, 1): that share of the target mass is spread evenly over the vocabulary, as in torch;
        it needs mean_v z_v, which is h.mean(W) + mean(b), so it is refused with softcap.
    Returns: scalar, or [...] for "none"; differentiable in hidden, weight, bias.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; expected 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing and head_options.get("softcap") is not None:
        raise ValueError("label_smoothing with softcap has no logits-free form here; drop one of the two")
    if label_smoothing and head_options.get("process_group") is not None:
        raise ValueError("label_smoothing with process_group is not supported: the mean logit spans all ranks")
    outputs = ("logprobs", "logsumexp") if (label_smoothing or z_loss) else ("logprobs",)
    stats = linear_logprobs(hidden, weight, targets, bias, ignore_index=ignore_index, outputs=outputs, **head_options)
    loss = -stats.logprobs
    keep = targets != ignore_index
    if label_smoothing:
        # mean_v log p_v = mean_v z_v - lse, and the mean over v of a linear map is the linear map of the mean.
        acc = loss.dtype
        hidden, weight = settle_dtypes(hidden, weight)
        clean = hidden.masked_fill(~keep.unsqueeze(-1), 0.0)  # garbage in an ignored row must not reach dW as 0 * NaN
        mean_z = (clean.to(acc) * weight.mean(0, dtype=acc)).sum(-1)
        if bias is not None:
            mean_z = mean_z + bias.to(acc).mean()
        mean_z = mean_z * head_options.get("logit_scale", 1.0) / head_options.get("temperature", 1.0)
        smooth = torch.where(keep, stats.logsumexp - mean_z, torch.zeros_like(loss))
        loss = (1 - label_smoothing) * loss + label_smoothing * smooth
    if z_loss:
        loss = loss + z_loss * stats.logsumexp.square()
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / keep.sum()


def head_statistics(
    head: HeadSpec,
    hidden: Tensor,
    targets: Tensor,
    outputs: tuple,
    *,
    backend: str | None = None,
    strategy: str | None = None,
    workspace_bytes: int | None = None,
    ignore_index: int = -100,
    batch_invariant: bool = False,
    process_group=None,
    debug_checks: bool = False,
) -> TokenStats:
    """Differentiable statistics of rows [N, H]. The door behind linear_logprobs and fused_loss."""
    name = dispatch.pick(backend, hidden, native=True, group=process_group is not None)
    if name in ("reference", "triton") and process_group is not None:
        raise ValueError(f"backend={name!r} does not take a process_group; use backend=None, 'torch' or 'native'")
    if name == "reference":
        return _reference_statistics(head, hidden, targets, outputs, ignore_index, debug_checks)
    temperatures = head.temperature if isinstance(head.temperature, Tensor) else None
    needs = tuple(
        torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, head.weight, head.bias)
    )
    differentiable = tuple(n for n in outputs if n in DIFFERENTIABLE)
    call = Call(
        ",".join(outputs),
        name,
        dispatch.statistics_strategy(strategy, name, needs, differentiable),
        dispatch.workspace(workspace_bytes, hidden, 0 if process_group is not None else head.weight.shape[0]),
        head.logit_scale,
        head.softcap,
        1.0 if temperatures is not None else float(head.temperature),
        ignore_index,
        batch_invariant,
        debug_checks,
        "" if process_group is None else process_group.group_name,
    )
    return custom.statistics(hidden, head.weight, head.bias, targets, temperatures, call)


def _reference_statistics(
    head: HeadSpec, hidden: Tensor, targets: Tensor, outputs: tuple, ignore_index: int, debug_checks: bool
) -> TokenStats:
    rows = custom.kept_rows(targets, ignore_index)
    if rows is not None:
        hidden, head = hidden[rows], head.at_rows(rows)
    own = targets if rows is None else targets[rows]
    check_targets(own, rows, head.weight.shape[0], debug_checks)
    options = dict(temperature=head.temperature, logit_scale=head.logit_scale, softcap=head.softcap)
    with autocast_off(hidden):
        z = reference.logits(hidden, head.weight, head.bias, **options)
    stats = TokenStats(**reference.statistics(z, own, outputs))
    if rows is None:
        return stats
    return stats.map(lambda x: x.new_zeros(targets.shape[0]).index_copy(0, rows, x))


def _known(outputs) -> tuple[str, ...]:
    outputs = (outputs,) if isinstance(outputs, str) else tuple(dict.fromkeys(outputs))
    for name in outputs:
        if name not in STAT_NAMES:
            raise ValueError(f"outputs has unknown name {name!r}; expected any of {', '.join(STAT_NAMES)}")
    if not outputs:
        raise ValueError(f"outputs is empty; ask for any of {', '.join(STAT_NAMES)}")
    return outputs
