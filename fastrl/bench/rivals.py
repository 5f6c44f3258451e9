"""fastrl and its rivals, one table: what each is given, and the reason where it cannot run a case.

A contender is a function (problem, hidden, weight) -> (loss or None, log-probs or None). Those that give differentiable
log-probs leave the law to problems.mean_loss; the others compute their own, which must be the same to float64.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.bench.problems import BETA, CLIP, LOSSES, SEQUENCES, TITLES, WHATS, Case, Problem, mean_loss

Law = Callable[[Problem, Tensor, Tensor], tuple[Tensor | None, Tensor | None]]
TRAINING = tuple(w for w in WHATS if w != "forward")
LOSS_ONLY = tuple(w for w in TRAINING if w != "tokens")


@dataclass(frozen=True)
class Contender:
    """build(case) -> Law. package: what must be importable. losses, whats: the cases it has an answer for.

    compiles: for each shape anew, on the first call. note: what really runs off CUDA.
    """

    build: Callable[[Case], Law]
    package: str | None = None
    losses: tuple[str, ...] = tuple(LOSSES)
    whats: tuple[str, ...] = WHATS
    cuda_only: bool = False
    compiles: bool = False
    note: str = ""


@dataclass
class Result:
    """Log-probs [N], dH, dW; None where the case or the contender has none."""

    logprobs: Tensor | None
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if x is not None}


def runner(name: str, case: Case) -> Callable[[Problem], Result]:
    """One call of a contender: a forward, or a forward and a backward, from fresh leaves."""
    law = CONTENDERS[name].build(case)

    def run(problem: Problem) -> Result:
        hidden, weight = problem.leaves()
        if case.what == "forward":
            with torch.no_grad():
                return Result(law(problem, hidden, weight)[1])
        loss, logprobs = law(problem, hidden, weight)
        loss = mean_loss(logprobs, problem) if loss is None else loss
        wanted = {n: x for n, x in (("d_hidden", hidden), ("d_weight", weight)) if x.requires_grad}
        grads = dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))
        return Result(None if logprobs is None else logprobs.detach(), **grads)

    return run


def reason(name: str, case: Case) -> str | None:
    """Why a contender cannot be asked, or None. What only running it shows is found out when it runs."""
    contender = CONTENDERS[name]
    if case.what not in contender.whats:
        return f"offers no such call: {TITLES[case.what]}"
    if case.loss not in contender.losses:
        return f"has no {LOSSES[case.loss]}"
    if contender.cuda_only and not case.device.startswith("cuda"):
        return "runs on CUDA only"
    if contender.package and importlib.util.find_spec(contender.package) is None:
        return f"not installed: pip install {INSTALL[contender.package]}"
    return None


INSTALL = {
    "trl": "'fastrl[bench]'",
    "liger_kernel": "'fastrl[bench]'",
    "cut_cross_entropy": "cut-cross-entropy",
    "quack": "quack-kernels (needs nvidia-cutlass-dsl)",
    "cutlass": "nvidia-cutlass-dsl",
}


# -- fastrl ------------------------------------------------------------------------------------------------------------
def fastrl_head(case: Case) -> Law:
    """fused_loss; for `forward` and `tokens`, linear_logprobs."""
    import fastrl

    if case.what in ("forward", "tokens"):
        return fastrl_tokens(case)
    laws = {"nll": {}, "ppo_clip": dict(clip_low=CLIP, clip_high=CLIP), "dpo": dict(beta=BETA, reference_free=True)}
    objective = fastrl.losses.get(case.loss, **laws[case.loss])
    aggregate = "sequence_mean_token_mean" if case.loss == "dpo" else "token_mean"
    options = chosen(case, ("forward", "frozen"))
    # Advantages of zero are known beforehand: those rows are left out of the forward too.
    options |= dict(skip_inert=True) if case.what == "zero" else {}

    def run(problem, hidden, weight):
        bounds = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=hidden.device) * (case.rows // SEQUENCES)
        extra = {}
        if case.loss == "ppo_clip":
            extra = dict(advantages=problem.advantages, old_logprobs=problem.old_logprobs)
        mask = problem.mask if case.what == "masked" else None
        batch = fastrl.TokenBatch(problem.data.targets, mask, bounds, **extra)
        out = fastrl.fused_loss(objective, hidden, weight, batch, aggregate=aggregate, **options)
        return out.loss, out.stats.logprobs

    return run


def fastrl_tokens(case: Case) -> Law:
    import fastrl

    options = chosen(case, ("one_pass",))

    def run(problem, hidden, weight):
        labels = problem.labels if case.what == "masked" else problem.data.targets
        return None, fastrl.linear_logprobs(hidden, weight, labels, **options).logprobs

    return run


def fastrl_invariant(case: Case) -> Law:
    """Log-probs whose bits do not depend on the other rows."""
    import fastrl

    def run(problem, hidden, weight):
        stats = fastrl.linear_logprobs(
            hidden, weight, problem.data.targets, batch_invariant=True, **chosen(case, ("one_pass",))
        )
        return None, stats.logprobs

    return run


def chosen(case: Case, others: tuple[str, ...]) -> dict[str, Any]:
    """The case's backend and strategy; a strategy of the `others`, which belong to the other function, is left out."""
    return {"backend": case.backend, "strategy": None if case.strategy in others else case.strategy}


# -- plain torch -------------------------------------------------------------------------------------------------------
def gathered(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Materialised. One expression: the logits die as soon as their log-softmax exists."""
    table = torch.log_softmax((hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)), 1)
    return table.gather(1, targets.unsqueeze(1)).squeeze(1)


def naive(case: Case) -> Law:
    return lambda problem, hidden, weight: (None, gathered(hidden, weight, problem.data.targets))


def compiled(case: Case) -> Law:
    function = torch.compile(gathered, dynamic=False)
    return lambda problem, hidden, weight: (None, function(hidden, weight, problem.data.targets))


def torch_linear_cross_entropy(case: Case) -> Law:
    """torch.nn.functional.linear_cross_entropy with its default chunking; log-probs by reduction="none"."""
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise NotImplementedError(f"torch {torch.__version__} has no linear_cross_entropy; it came with 2.13")
    options = torch.nn.LinearCrossEntropyOptions()

    def run(problem, hidden, weight):
        if case.loss == "nll" and case.what in LOSS_ONLY:
            return function(hidden, weight, problem.labels, ignore_index=-100, options=options), None
        return None, -function(hidden, weight, problem.data.targets, reduction="none", options=options)

    return run


# -- rivals ------------------------------------------------------------------------------------------------------------
def trl_chunked(case: Case) -> Law:
    """What TRL 1.16's trainers call; its vocabulary chunk is the trainers' own."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def run(problem, hidden, weight):
        targets = problem.data.targets
        return None, ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, CHUNK, None, 1.0, ())[0]

    return run


def liger_grpo(case: Case) -> Law:
    """Liger's GRPO with its "dapo" token mean; compiled=False (only the [N] arithmetic would be compiled)."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    clip = dict(epsilon_low=CLIP, epsilon_high=CLIP)
    law = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo", **clip)

    def run(problem, hidden, weight):
        by_sequence = (x.view(SEQUENCES, -1) for x in (problem.data.targets, problem.mask.float()))
        old = problem.old_logprobs.view(SEQUENCES, -1)
        rows = hidden.view(SEQUENCES, -1, case.hidden)
        return law(rows, weight, *by_sequence, problem.advantages, old_per_token_logps=old)[0], None

    return run


def liger_dpo(case: Case) -> Law:
    """Liger's chunked DPO, one pair at a time (its default), uncompiled; it wants all chosen before all rejected."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    law = LigerFusedLinearDPOLoss(beta=BETA, compiled=False, use_ref_model=False)
    order = [*range(0, SEQUENCES, 2), *range(1, SEQUENCES, 2)]

    def run(problem, hidden, weight):
        rows = hidden.view(SEQUENCES, -1, case.hidden)[order]
        return law(weight, rows, problem.data.targets.view(SEQUENCES, -1)[order])[0], None

    return run


def liger_scaled(case: Case) -> Law:
    """Per-token NLL. CuTe DSL kernels on sm_90 with nvidia-cutlass-dsl; elsewhere Liger's own chunks in torch."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def run(problem, hidden, weight):
        return None, -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, problem.data.targets)

    return run


def liger_scaled_torch(case: Case) -> Law:
    """The same without cutlass: what Liger runs where its CuTe kernels do not."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import _FusedLinearPPOFallbackFunction as Fallback

    return lambda problem, hidden, weight: (
        None,
        -Fallback.apply(hidden, weight, problem.data.targets, 1.0, -100, False),
    )


def liger_triton(case: Case) -> Law:
    """Liger's Triton fused linear cross-entropy, mean."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda problem, hidden, weight: (liger_fused_linear_cross_entropy(hidden, weight, problem.labels), None)


def quack_chunked(case: Case) -> Law:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda problem, hidden, weight: (chunked_linear_cross_entropy(hidden, weight, problem.labels), None)


def cut_cross_entropy(exact: bool) -> Callable[[Case], Law]:
    """Apple's CCE per token: its Triton kernels on CUDA, elsewhere its torch_compile form (materialised logits).

    Its default drops gradient entries below a threshold; `exact` keeps them all.
    """

    def build(case: Case) -> Law:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if case.device.startswith("cuda") else "torch_compile"
        options = dict(reduction="none", impl=impl, **(dict(filter_eps=None) if exact else {}))

        def run(problem, hidden, weight):
            return None, -linear_cross_entropy(hidden, weight, problem.data.targets, **options)

        return run

    return build


LIGER_NOTE = "CuTe kernels on sm_90 only; elsewhere its fallback in torch, 512 rows at a time, runs"
CCE_NOTE = "Triton kernels on CUDA only; elsewhere its torch_compile form, which materialises the logits, runs"
NLL, POLICY, PAIRS = ("nll",), ("ppo_clip",), ("dpo",)
CONTENDERS: dict[str, Contender] = {
    "fastrl": Contender(fastrl_head),
    "fastrl per-token API": Contender(fastrl_tokens, whats=LOSS_ONLY),
    "fastrl batch-invariant": Contender(fastrl_invariant, whats=("forward",)),
    "naive log_softmax": Contender(naive),
    "naive torch.compile": Contender(compiled, compiles=True),
    "torch linear_cross_entropy": Contender(torch_linear_cross_entropy),
    "TRL chunked head": Contender(trl_chunked, "trl"),
    "Liger GRPO": Contender(liger_grpo, "liger_kernel", POLICY, LOSS_ONLY),
    "Liger DPO": Contender(liger_dpo, "liger_kernel", PAIRS, ("head", "frozen")),
    "Liger scaled CE": Contender(liger_scaled, "liger_kernel", note=LIGER_NOTE),
    "Liger scaled CE without cutlass": Contender(liger_scaled_torch, "liger_kernel", cuda_only=True),
    "Liger Triton CE": Contender(liger_triton, "liger_kernel", NLL, LOSS_ONLY, cuda_only=True),
    "quack": Contender(quack_chunked, "quack", NLL, LOSS_ONLY, cuda_only=True),
    "cut-cross-entropy": Contender(cut_cross_entropy(exact=False), "cut_cross_entropy", compiles=True, note=CCE_NOTE),
    "cut-cross-entropy exact": Contender(cut_cross_entropy(exact=True), "cut_cross_entropy", cuda_only=True),
}


def names_of(only: str = "") -> list[str]:
    """Contenders with one of these names, or with a word that begins so; `only` is separated by commas; "": all."""
    words = [w.strip().lower() for w in only.split(",") if w.strip()]
    whole = {n.lower() for n in CONTENDERS}
    begins = [re.compile(rf"\b{re.escape(w)}") for w in words if w not in whole]
    found = [n for n in CONTENDERS if not words or n.lower() in words or any(b.search(n.lower()) for b in begins)]
    if not found:
        raise ValueError(f"--only {only} fits no contender; they are: {'; '.join(CONTENDERS)}")
    return found
