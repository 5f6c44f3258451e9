"""linear_divergence: per-token divergence of a student head from a teacher head, no logits of either ever stored.

p = softmax of the student's logits, q of the teacher's. dL/dz_v = p_v (g_v - E_p[g]) with g_v = dD/dp_v:
    forward_kl  sum q log(q/p)                    dz = p - q
    reverse_kl  sum p log(p/q)                    g = log(p/q)
    jsd         b KL(q||m) + (1-b) KL(p||m)       g = (1-b) log(p/m),   m = b q + (1-b) p
    tvd         sum |p - q| / 2                   g = sign(p - q) / 2
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastrl.ops import dispatch, reference
from fastrl.ops.checks import autocast_off, head_spec, settle_dtypes
from fastrl.ops.head import HeadSpec, accumulation_dtype
from fastrl.ops.once import no_second_derivative

KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")
MIXTURES = ("mixed", "skew_forward_kl", "skew_reverse_kl")  # for fused_loss; the torch backend and the reference alone
_MODULES = {"torch": "fastrl.ops.divergence_torch", "triton": "fastrl.ops.divergence_triton"}


@dataclass(frozen=True)
class Law:
    """Which divergence; beta is read by jsd and by MIXTURES (fastrl.objective.Divergence says what it is there)."""

    kind: str
    beta: float = 0.5

    @property
    def bound(self) -> float:
        """The largest value it can take: -b log b - (1-b) log(1-b) for jsd, 1 for tvd, for the skew KLs minus the log
        of a distribution's share in its mixture, none for the KLs."""
        if self.kind == "jsd":
            return -self.beta * math.log(self.beta) - (1 - self.beta) * math.log1p(-self.beta)
        if self.kind in ("skew_forward_kl", "skew_reverse_kl"):
            return -math.log(self.beta if self.kind == "skew_forward_kl" else 1 - self.beta)
        return 1.0 if self.kind == "tvd" else math.inf


@dataclass(frozen=True)
class Side:
    """One head and the rows [N, H] that go through it."""

    hidden: Tensor
    head: HeadSpec

    def at_rows(self, rows: slice | Tensor) -> Side:
        return Side(self.hidden[rows], self.head.at_rows(rows))


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    kind: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "none",
    backend: str | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Full-vocabulary divergence of student p from teacher q, token by token, straight from hidden states.

    No [N, V] tensor is formed: rows are taken in chunks whose logits, of both heads, fit `workspace_bytes`.

    Args:
        hidden: [..., H] and weight: [V, H], one floating dtype; bias: [V] or None. The student; differentiable.
        teacher_hidden: [..., H'] with the same leading shape, teacher_weight: [V, H'], teacher_bias: [V] or None.
            Never differentiated. Its dtype may differ from the student's, but for float64, which both have or neither.
        kind: "forward_kl" KL(q||p), "reverse_kl" KL(p||q), "jsd", or "tvd" sum |p - q| / 2 (in [0, 1]; its subgradient
            where p_v = q_v is 0).
        beta: jsd alone, 0 < beta < 1: beta KL(q||m) + (1 - beta) KL(p||m), m = beta q + (1 - beta) p, the generalised
            JSD of GKD (Agarwal et al. 2024, eq. 1) and of TRL's GKDTrainer. TRL's beta = 0 and 1 are forward_kl and
            reverse_kl; the true limits are 0, and are refused.
        temperature: positive float, or [...] one per token (not differentiated); divides the logits of both heads.
            No factor temperature^2 is applied.
        logit_scale, softcap: z = softcap * tanh(logit_scale * (h.W + b) / softcap) / temperature, each head its own.
        mask: bool [...]; False rows give 0 and no gradient, whatever they hold, and cost nothing.
        weights: [...] floating, a constant factor of each token's divergence, or None for 1.
        reduction: "none" [...]: any upstream gradient; the backward recomputes both heads' logits of the rows whose
            upstream gradient is not zero (6 GEMMs in all, 8 in the kernels for half precision). "sum", "mean" (over
            the rows kept, or over the sum of their weights; 0 when there are none): the gradients are made in the
            forward pass, 4 GEMMs in all, and rows of weight zero cost nothing.
        backend: None (by device), "reference", "torch" or "triton". workspace_bytes: bytes of logits at once.

    Returns: [...] or scalar, float32 (float64 for float64 input), differentiable once in hidden, weight and bias. Every
        token's value is in [0, inf], the bounded kinds' within their bound. Words masked in both heads (-inf) add
        nothing; reverse_kl (forward_kl) is inf where the teacher (student) alone masks a word the other holds.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or numbers that do not fit, naming both sides.
    """
    law = _law(kind, beta, reduction)
    for name, x in (("teacher_hidden", teacher_hidden), ("teacher_weight", teacher_weight)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    hidden, weight = settle_dtypes(hidden, weight)
    teacher_hidden, teacher_weight = settle_dtypes(teacher_hidden, teacher_weight)
    check_pair(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias)
    shape = hidden.shape[:-1]
    head = head_spec(weight, bias, temperature, logit_scale, softcap, hidden)
    _check_teacher_transform(teacher_logit_scale, teacher_softcap)
    constants = (None if x is None else x.detach() for x in (teacher_weight, teacher_bias))
    other = head_spec(*constants, temperature, teacher_logit_scale, teacher_softcap, hidden)
    student = Side(hidden.reshape(-1, hidden.shape[-1]), head)
    teacher = Side(teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]), other)
    acc = accumulation_dtype(hidden.dtype)
    factors = _factors(weights, shape, acc, hidden.device)
    rows = _kept_rows(mask, None if reduction == "none" else factors, shape, hidden.device)
    n = student.hidden.shape[0]
    if rows is not None:
        student, teacher = student.at_rows(rows), teacher.at_rows(rows)
        factors = None if factors is None else factors[rows]
    budget = dispatch.workspace(workspace_bytes, hidden, weight.shape[0])
    call = Call(law, dispatch.pick(backend, hidden), budget)
    if reduction == "none":
        values = per_token(student, teacher, call)
        values = values if factors is None else values * factors
        return (values if rows is None else values.new_zeros(n).index_copy(0, rows, values)).reshape(shape)
    factors = torch.ones(student.hidden.shape[0], dtype=acc, device=hidden.device) if factors is None else factors
    if reduction == "mean" and factors.shape[0]:
        factors = factors / factors.sum()
    return weighted_total(student, teacher, factors, call)


# -- differentiation -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Call:
    """How it is to run: the law, the backend's name and the bytes of logits that may exist at once."""

    law: Law
    backend: str
    workspace: int

    @property
    def module(self) -> ModuleType:
        """The backend's module: values, gradients, one_pass."""
        return importlib.import_module(_MODULES[self.backend])


def per_token(student: Side, teacher: Side, call: Call) -> Tensor:
    """[N] divergences of rows that all count, differentiable with any upstream gradient."""
    if call.backend == "reference":
        return _by_reference(student, teacher, call.law)
    return _PerToken.apply(student.hidden, student.head.weight, student.head.bias, student, teacher, call)


def weighted_total(student: Side, teacher: Side, factors: Tensor, call: Call) -> Tensor:
    """Scalar sum of factors [N] times divergence; gradients in the forward where any are wanted."""
    tensors = (student.hidden, student.head.weight, student.head.bias)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if call.backend == "reference" or not wanted:
        return (per_token(student, teacher, call) * factors).sum()
    return _OnePass.apply(*tensors, student, teacher, factors, call)


class _PerToken(torch.autograd.Function):
    """Forward: one GEMM a head. Backward: both again for the rows with an upstream gradient, then dX and dW."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, student: Side, teacher: Side, call: Call):
        with autocast_off(hidden):
            values, saved = call.module.values(call.law, _own(student, hidden, weight, bias), teacher, call.workspace)
        t = teacher
        ctx.save_for_backward(hidden, weight, bias, t.hidden, t.head.weight, t.head.bias, *saved)
        ctx.heads, ctx.call = (student.head, teacher.head), call
        return values

    @staticmethod
    @no_second_derivative
    def backward(ctx, upstream):
        hidden, weight, bias, other_hidden, other_weight, other_bias, *saved = ctx.saved_tensors
        student, teacher = (Side(None, head) for head in ctx.heads)
        student = _own(student, hidden, weight, bias)
        teacher = _own(teacher, other_hidden, other_weight, other_bias)
        rows = (upstream != 0).nonzero().squeeze(1)
        dropped = rows.shape[0] < upstream.shape[0]
        if dropped:
            student, teacher, upstream = student.at_rows(rows), teacher.at_rows(rows), upstream[rows]
            saved = [x[..., rows] for x in saved]
        call, needs = ctx.call, tuple(ctx.needs_input_grad[:3])
        with autocast_off(hidden):
            d_hidden, d_weight, d_bias = call.module.gradients(
                call.law, student, teacher, tuple(saved), upstream, needs, call.workspace
            )
        if dropped and d_hidden is not None:
            d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, d_hidden)
        return d_hidden, d_weight, d_bias, None, None, None


class _OnePass(torch.autograd.Function):
    """Total and gradients in one walk over the chunks; backward only scales them by dL/dtotal."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, student: Side, teacher: Side, factors, call: Call):
        needs = tuple(ctx.needs_input_grad[:3])
        with autocast_off(hidden):
            values, *grads = call.module.one_pass(
                call.law, _own(student, hidden, weight, bias), teacher, factors, needs, call.workspace
            )
        ctx.save_for_backward(*grads)
        return (values * factors).sum()

    @staticmethod
    @no_second_derivative
    def backward(ctx, upstream):
        grads = ctx.saved_tensors
        # On the CPU the usual upstream of exactly 1 is seen for free, and saves a walk over dW.
        if upstream.device.type != "cpu" or float(upstream) != 1.0:
            grads = [None if g is None else g * upstream for g in grads]  # 0-dim: the dtype of g stays
        return *grads, None, None, None, None


def _own(side: Side, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Side:
    """The side with the tensors that autograd handed back."""
    h = side.head
    return Side(hidden, HeadSpec(weight, bias, h.logit_scale, h.softcap, h.temperature))


def _by_reference(student: Side, teacher: Side, law: Law) -> Tensor:
    made = []
    with autocast_off(student.hidden):
        for side in (student, teacher):
            h = side.head
            options = dict(temperature=h.temperature, logit_scale=h.logit_scale, softcap=h.softcap)
            made.append(reference.logits(side.hidden, h.weight, h.bias, **options))
        return reference.divergence(*made, law.kind, law.beta)


# -- the door ----------------------------------------------------------------------------------------------------------
def check_pair(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias) -> None:
    """Shapes, dtypes and devices of both heads. Raises ValueError or TypeError naming both sides."""
    sides = {"": (hidden, weight, bias), "teacher_": (teacher_hidden, teacher_weight, teacher_bias)}
    for prefix, (h, w, b) in sides.items():
        h_name, w_name, b_name = (f"{prefix}{n}" for n in ("hidden", "weight", "bias"))
        if h.dim() < 1 or w.dim() != 2 or h.shape[-1] != w.shape[1]:
            raise ValueError(
                f"{h_name} is {list(h.shape)} but {w_name} is {list(w.shape)}; expected [..., H] and [V, H], same H"
            )
        if b is not None and not isinstance(b, Tensor):
            raise TypeError(f"{b_name} must be a tensor, got {type(b).__name__}")
        for name, x in ((h_name, h), (w_name, w), (b_name, b)):
            if x is not None and not x.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {x.dtype}")
            if x is not None and x.device != hidden.device:
                raise ValueError(f"{name} is on {x.device} but hidden is on {hidden.device}; move one of them")
        if h.dtype != w.dtype:
            raise ValueError(f"{h_name} is {h.dtype} but {w_name} is {w.dtype}; cast one, or run under torch.autocast")
        if b is not None and b.shape != w.shape[:1]:
            raise ValueError(f"{b_name} is {list(b.shape)} but {w_name} is {list(w.shape)}; expected [V={w.shape[0]}]")
    if hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} but teacher_hidden is {list(teacher_hidden.shape)}; expected the same rows"
        )
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"weight is {list(weight.shape)} but teacher_weight is {list(teacher_weight.shape)}; the two heads must "
            "share one vocabulary V: cut the padding rows of the larger one"
        )
    if (hidden.dtype == torch.float64) != (teacher_hidden.dtype == torch.float64):
        raise ValueError(
            f"hidden is {hidden.dtype} but teacher_hidden is {teacher_hidden.dtype}; use float64 for both or neither"
        )


def _law(kind: str, beta: float, reduction: str) -> Law:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    if kind == "jsd" and not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta must be between 0 and 1, both excluded, got {beta}; use kind='forward_kl' or 'reverse_kl'"
        )
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; expected 'none', 'sum' or 'mean'")
    return Law(kind, float(beta))


def _check_teacher_transform(scale: float, softcap: float | None) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"teacher_logit_scale must be finite, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"teacher_softcap must be positive or None, got {softcap}")


def _factors(weights: Tensor | None, shape: torch.Size, dtype: torch.dtype, device) -> Tensor | None:
    """weights as [N] constants in the accumulation dtype."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or weights.shape != shape or weights.requires_grad:
        got = f"{list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
        grad = " with requires_grad=True; pass weights.detach()" if getattr(weights, "requires_grad", False) else ""
        raise ValueError(f"weights is {got}{grad}; expected a constant tensor {list(shape)}, one weight per row")
    return weights.reshape(-1).to(device, dtype)


def _kept_rows(mask: Tensor | None, factors: Tensor | None, shape: torch.Size, device) -> Tensor | None:
    """[K] ascending indices of the rows that count, or None where all do."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != shape):
        got = f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask is {got}; expected a bool tensor {list(shape)}, one per row; cast it with .bool()")
    keep = None if mask is None else mask.reshape(-1).to(device)
    if factors is not None:
        keep = (factors != 0) if keep is None else keep & (factors != 0)
    if keep is None:
        return None
    rows = keep.nonzero().squeeze(1)
    return None if rows.shape[0] == keep.shape[0] else rows
