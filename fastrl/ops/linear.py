"""linear_logprobs and linear_cross_entropy: per-token statistics of a linear head, logits never formed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.ops import dispatch, reference
from fastrl.ops.checks import autocast_off, check_inputs, check_targets, head_spec, settle_dtypes
from fastrl.ops.head import Coefs, HeadSpec, Saved, accumulation_dtype
from fastrl.ops.once import no_second_derivative
from fastrl.tokens import STAT_NAMES, TokenStats

DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")


@dataclass(frozen=True)
class Call:
    """How a head call is to run: one record instead of seven arguments on every level."""

    outputs: tuple[str, ...]
    backend: str
    workspace: int
    logit_scale: float
    softcap: float | None
    temperature: float | Tensor

    def head(self, weight: Tensor, bias: Tensor | None) -> HeadSpec:
        return HeadSpec(weight, bias, self.logit_scale, self.softcap, self.temperature)


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
    workspace_bytes: int | None = None,
    debug_checks: bool = False,
) -> TokenStats:
    """Per-token statistics of softmax(z), z = softcap*tanh(logit_scale*(h.W + b)/softcap) / temperature.

    No [N, V] tensor is formed: rows are taken in chunks whose logits fit `workspace_bytes`, and the backward
    recomputes them (4 GEMMs in all; rows whose upstream gradient is zero are dropped from the last three).

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64; any strides.
        weight: [V, H], same dtype and device. bias: [V] or None.
        targets: [...] int32/int64, the token predicted from hidden[...]; rows equal to ignore_index give 0 in every
            output and no gradient. Out of [0, V): ValueError on the CPU (and anywhere with debug_checks), NaN on CUDA.
        temperature: positive float, or [...] one per token (not differentiated).
        logit_scale, softcap: the model's own logit transform (Cohere, Granite; Gemma).
        outputs: any of logprobs, entropy, logsumexp, log_sum_sq_probs, is_argmax.
        support: (indices [nnz] int, offsets [N+1] int): log-softmax over each row's kept tokens only.
        backend: None (by device), "reference", "torch" or "triton".
        workspace_bytes: bytes of logits that may exist at once.

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
        from fastrl.ops.support import support_statistics

        return support_statistics(head, h, flat, support, outputs, ignore_index).map(lambda x: x.reshape(shape))
    rows = (flat != ignore_index).nonzero().squeeze(1)
    everything = rows.shape[0] == flat.shape[0]
    if not everything:
        h, head = h[rows], head.at_rows(rows)
    kept = flat if everything else flat[rows]
    check_targets(kept, rows, weight.shape[0], debug_checks)
    stats = head_statistics(head, h, kept, outputs, backend, workspace_bytes)
    if not everything:
        stats = stats.map(lambda x: x.new_zeros(flat.shape[0]).index_copy(0, rows, x))
    return stats.map(lambda x: x.reshape(shape))


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
    head: HeadSpec, hidden: Tensor, targets: Tensor, outputs: tuple, backend: str | None, workspace_bytes: int | None
) -> TokenStats:
    """Differentiable statistics of rows [N, H] that are all valid. The door behind linear_logprobs and fused_loss."""
    name = dispatch.pick(backend, hidden)
    if name == "reference":
        options = dict(temperature=head.temperature, logit_scale=head.logit_scale, softcap=head.softcap)
        with autocast_off(hidden):
            z = reference.logits(hidden, head.weight, head.bias, **options)
        return TokenStats(**reference.statistics(z, targets, outputs))
    budget = dispatch.workspace(workspace_bytes, hidden, head.weight.shape[0])
    call = Call(outputs, name, budget, head.logit_scale, head.softcap, head.temperature)
    made = _LinearStatistics.apply(hidden, head.weight, head.bias, targets, call)
    return TokenStats(**dict(zip(outputs, made, strict=True)))


class _LinearStatistics(torch.autograd.Function):
    """Forward: 1 GEMM, saves three [N] vectors. Backward: recompute, then the GEMMs of the inputs that ask for it."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, call: Call):
        backend = dispatch.module(call.backend)
        # dH/dz needs H itself, so a differentiable entropy is saved with the rest.
        with autocast_off(hidden):
            stats, saved = backend.statistics(call.head(weight, bias), hidden, targets, call.outputs, call.workspace)
        ctx.save_for_backward(hidden, weight, bias, targets, saved.max, saved.log_sum, saved.logprobs, saved.entropy)
        ctx.call = call
        ctx.set_materialize_grads(False)
        made = tuple(getattr(stats, name) for name in call.outputs)
        ctx.mark_non_differentiable(*(x for n, x in zip(call.outputs, made, strict=True) if n not in DIFFERENTIABLE))
        return made

    @staticmethod
    @no_second_derivative
    def backward(ctx, *upstream):
        hidden, weight, bias, targets, top, log_sum, logprobs, entropy = ctx.saved_tensors
        call, acc = ctx.call, accumulation_dtype(hidden.dtype)
        given = {
            n: g.to(acc) for n, g in zip(call.outputs, upstream, strict=True) if g is not None and n in DIFFERENTIABLE
        }
        if not given:
            return None, None, None, None, None
        needs = tuple(ctx.needs_input_grad[:3])
        saved = Saved(top, log_sum, logprobs, entropy)
        backend, head = dispatch.module(call.backend), call.head(weight, bias)
        with autocast_off(hidden):
            grads = backend.gradients(head, hidden, targets, saved, Coefs(**given), needs, call.workspace)
        return *grads, None, None


def _known(outputs) -> tuple[str, ...]:
    outputs = (outputs,) if isinstance(outputs, str) else tuple(dict.fromkeys(outputs))
    for name in outputs:
        if name not in STAT_NAMES:
            raise ValueError(f"outputs has unknown name {name!r}; expected any of {', '.join(STAT_NAMES)}")
    if not outputs:
        raise ValueError(f"outputs is empty; ask for any of {', '.join(STAT_NAMES)}")
    return outputs
