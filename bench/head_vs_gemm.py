"""The LM head's forward and backward against bare GEMMs and against its rivals.

    python bench/head_vs_gemm.py                      N=2048 D=512 V=65536 fp32 on the CPU, clipped policy loss
    python bench/head_vs_gemm.py --loss nll           mean cross-entropy; adds torch.nn.functional.linear_cross_entropy
    python bench/head_vs_gemm.py --rows 512 --only fastrl,naive --rounds 3 --out /tmp/x.json

Time: every contender and the three GEMMs (h W^T, dZ W, dZ^T h, all [N, V] at once, outputs allocated beforehand) in one
process, in alternating rounds; medians. Memory: each contender once in a process of its own (bench/common.py), inputs
excluded, returned gradients of h and W included. Accuracy: log-probs, dH and dW against float64.
The data is random, the advantages one a sequence (8 sequences; Liger takes no others), the old log-probs near the
policy's, so that a part of the tokens is clipped; that part is in the JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

import common
import torch
from torch import Tensor

CLIP = 0.2
SEQUENCES = 8


@dataclass
class Problem:
    """N rows in SEQUENCES equal sequences. truth: float64 {logprobs [N], d_hidden [N, H], d_weight [V, H]} or {}."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    advantages: Tensor  # [SEQUENCES]
    old_logprobs: Tensor  # [N]
    clipped: float
    truth: dict[str, Tensor]

    def leaves(self) -> tuple[Tensor, Tensor]:
        """hidden and weight as fresh leaves that ask for gradients."""
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(self.hidden.shape[0] // SEQUENCES)


Result = tuple[Tensor | None, Tensor, Tensor]  # log-probs [N] or None, dH, dW
Contender = Callable[[Problem], Result]


def make_problem(args: argparse.Namespace, truth: bool) -> Problem:
    """Random hidden states and head with logits of standard deviation 2; every contender gets the same."""
    dtype = getattr(torch, args.dtype)
    if args.rows % SEQUENCES:
        raise ValueError(f"--rows is {args.rows}; expected a multiple of {SEQUENCES}, the number of sequences")
    make = torch.Generator().manual_seed(args.seed)
    hidden = torch.randn(args.rows, args.hidden, generator=make).to(dtype)
    weight = (torch.randn(args.vocabulary, args.hidden, generator=make) * (2 / args.hidden**0.5)).to(dtype)
    targets = torch.randint(args.vocabulary, (args.rows,), generator=make)
    advantages = torch.randn(SEQUENCES, generator=make)
    noise = args.old_noise * torch.randn(args.rows, generator=make)
    # No token within float error of a clip edge: which branch it takes must not depend on rounding.
    near = ((-noise).exp().sub(1).abs() - CLIP).abs() < 1e-3
    noise[near] = 0.0
    logprobs = logprobs64(hidden, weight, targets)
    ratio, spread = (-noise).exp(), advantages.repeat_interleave(args.rows // SEQUENCES)
    clipped = ((ratio > 1 + CLIP) & (spread > 0)) | ((ratio < 1 - CLIP) & (spread < 0))
    old = (logprobs + noise).float()
    problem = Problem(hidden, weight, targets, advantages, old, clipped.float().mean().item(), {})
    if truth:
        problem.truth = truth64(problem, args.loss)
    for name in ("hidden", "weight", "targets", "advantages", "old_logprobs"):
        setattr(problem, name, getattr(problem, name).to(args.device))
    return problem


def logprobs64(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 128) -> Tensor:
    """[N] float64, in chunks of rows."""
    parts = []
    for h, y in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        z = h.double() @ weight.double().t()
        parts.append(torch.log_softmax(z, 1).gather(1, y.unsqueeze(1)).squeeze(1))
    return torch.cat(parts)


def truth64(problem: Problem, loss: str, chunk: int = 128) -> dict[str, Tensor]:
    """dL/dlogp by autograd on [N], then dZ = c (onehot - p) row by row, all in float64."""
    logprobs = logprobs64(problem.hidden, problem.weight, problem.targets).requires_grad_()
    (coefficient,) = torch.autograd.grad(mean_loss(logprobs, problem, loss), logprobs)
    weight = problem.weight.double()
    d_hidden, d_weight = [], torch.zeros_like(weight)
    for h, y, c in zip(*(x.split(chunk) for x in (problem.hidden, problem.targets, coefficient)), strict=True):
        d_logits = -torch.softmax(h.double() @ weight.t(), 1)
        d_logits.scatter_add_(1, y.unsqueeze(1), torch.ones_like(c).unsqueeze(1))
        d_logits.mul_(c.unsqueeze(1))
        d_hidden.append(d_logits @ weight)
        d_weight.addmm_(d_logits.t(), h.double())
    return {"logprobs": logprobs.detach(), "d_hidden": torch.cat(d_hidden), "d_weight": d_weight}


def mean_loss(logprobs: Tensor, problem: Problem, loss: str) -> Tensor:
    """The law itself: mean over tokens of -log p, or of the clipped surrogate."""
    if loss == "nll":
        return -logprobs.mean()
    ratio = (logprobs - problem.old_logprobs.to(logprobs.dtype)).exp()
    advantages = problem.token_advantages.to(logprobs.dtype)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages).mean()


# -- contenders: (problem) -> (log-probs or None, dH, dW) -------------------------------------------------------------
def fastrl_head(loss: str) -> Contender:
    import fastrl

    clip = {} if loss == "nll" else dict(clip_low=CLIP, clip_high=CLIP)
    objective = fastrl.losses.get(loss, **clip)

    def run(problem: Problem) -> Result:
        hidden, weight = problem.leaves()
        per_sequence = hidden.shape[0] // SEQUENCES
        bounds = torch.arange(SEQUENCES + 1, dtype=torch.int32, device=hidden.device) * per_sequence
        extra = {} if loss == "nll" else dict(advantages=problem.advantages, old_logprobs=problem.old_logprobs)
        batch = fastrl.TokenBatch(problem.targets, None, bounds, **extra)
        out = fastrl.fused_loss(objective, hidden, weight, batch, aggregate="token_mean")
        return out.stats.logprobs, *torch.autograd.grad(out.loss, (hidden, weight))

    return run


def naive(loss: str) -> Contender:
    def run(problem: Problem) -> Result:
        hidden, weight = problem.leaves()
        # One expression: the logits die as soon as their log-softmax exists.
        table = torch.log_softmax((hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)), 1)
        logprobs = table.gather(1, problem.targets.unsqueeze(1)).squeeze(1)
        del table
        return logprobs.detach(), *torch.autograd.grad(mean_loss(logprobs, problem, loss), (hidden, weight))

    return run


def trl_chunked(loss: str) -> Contender:
    """What TRL 1.16's trainers call; its vocabulary chunk is the trainers' own."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK

    def run(problem: Problem) -> Result:
        hidden, weight = problem.leaves()
        logprobs = ChunkedLogProbFunction.apply(hidden, weight, None, problem.targets, 1.0, CHUNK, None, 1.0, ())[0]
        return logprobs.detach(), *torch.autograd.grad(mean_loss(logprobs, problem, loss), (hidden, weight))

    return run


def liger_grpo(loss: str) -> Contender:
    """Liger's GRPO with its "dapo" token mean; compiled=False (only the [N] arithmetic would be compiled)."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    law = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo"
    )

    def run(problem: Problem) -> Result:
        hidden, weight = problem.leaves()
        n = hidden.shape[0] // SEQUENCES
        mask = torch.ones(SEQUENCES, n, device=hidden.device)
        out, _ = law(
            hidden.view(SEQUENCES, n, -1),
            weight,
            problem.targets.view(SEQUENCES, n),
            mask,
            problem.advantages,
            old_per_token_logps=problem.old_logprobs.view(SEQUENCES, n),
        )
        return None, *torch.autograd.grad(out, (hidden, weight))

    return run


def torch_linear_cross_entropy(loss: str) -> Contender:
    """torch.nn.functional.linear_cross_entropy with its default chunking options."""
    function = torch.nn.functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()

    def run(problem: Problem) -> Result:
        hidden, weight = problem.leaves()
        value = function(hidden, weight, problem.targets, options=options)
        return None, *torch.autograd.grad(value, (hidden, weight))

    return run


CONTENDERS = {
    "fastrl": (fastrl_head, ("ppo_clip", "nll")),
    "naive log_softmax": (naive, ("ppo_clip", "nll")),
    "TRL chunked head": (trl_chunked, ("ppo_clip", "nll")),
    "Liger GRPO": (liger_grpo, ("ppo_clip",)),
    "torch linear_cross_entropy": (torch_linear_cross_entropy, ("nll",)),
}


def bare_gemms(problem: Problem) -> Callable[[], None]:
    """Three GEMMs over all N rows, nothing allocated inside the timed call."""
    hidden, weight = problem.hidden, problem.weight
    logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
    d_logits, d_hidden, d_weight = torch.randn_like(logits), torch.empty_like(hidden), torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(d_logits, weight, out=d_hidden)
        torch.mm(d_logits.t(), hidden, out=d_weight)

    return run


# -- measuring ---------------------------------------------------------------------------------------------------------
def memory_of(args: argparse.Namespace) -> dict:
    """In a process of its own: touch every code path on a small problem, then then one measured call."""
    build = CONTENDERS[args.memory_of][0](args.loss)
    small = argparse.Namespace(**{**vars(args), "rows": 64, "hidden": 64, "vocabulary": 512})
    build(make_problem(small, truth=False))
    problem = make_problem(args, truth=False)
    peak, result = common.extra_peak_mib(lambda: build(problem), args.device)
    returned = sum(x.numel() * x.element_size() for x in result if x is not None)
    return {"extra_peak_mib": None if peak is None else round(peak, 1), "returned_mib": round(returned / common.MIB, 1)}


def errors(result: Result, truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each output: Frobenius error over the truth's norm, and the largest error over the truth's largest entry."""
    out = {}
    for (name, right), got in zip(truth.items(), result, strict=True):
        if got is not None:
            off = got.detach().cpu().double() - right
            out[f"{name}_relative_l2"] = (off.norm() / right.norm()).item()
            out[f"{name}_relative_max"] = (off.abs().max() / right.abs().max()).item()
    return {name: float(f"{value:.3e}") for name, value in out.items()}


def measure(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    names = [n for n, (_, losses) in CONTENDERS.items() if args.loss in losses]
    if args.only:
        names = [n for n in names if any(part in n for part in args.only.split(","))]
    problem = make_problem(args, truth=True)
    built = {name: CONTENDERS[name][0](args.loss) for name in names}
    accuracy = {name: errors(run(problem), problem.truth) for name, run in built.items()}
    problem.truth = {}
    calls = {"three GEMMs": bare_gemms(problem)}
    calls |= {name: (lambda run=run: run(problem)) for name, run in built.items()}
    seconds = common.alternate(calls, args.rounds, args.device, args.quiet)
    floor = common.summary(seconds.pop("three GEMMs"))
    contenders = {}
    for name in names:
        row = common.summary(seconds[name])
        row["times_gemms"] = round(row["median_s"] / floor["median_s"], 3)
        row["times_gemms_best"] = round(row["min_s"] / floor["min_s"], 3)
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in shape_of(args).items()]
        row |= common.in_subprocess(__file__, [*flags, "--memory-of", name], args.threads)
        contenders[name] = {**row, "error_vs_float64": accuracy[name]}
    return {
        "bench": "head_vs_gemm",
        "command": common.command(),
        **shape_of(args),
        "clipped_tokens": round(problem.clipped, 4) if args.loss == "ppo_clip" else 0.0,
        "environment": common.environment(args.threads, args.device),
        "three_gemms": floor,
        "contenders": contenders,
    }


def shape_of(args: argparse.Namespace) -> dict:
    names = ("loss", "rows", "hidden", "vocabulary", "dtype", "device", "seed", "old_noise")
    return {name: getattr(args, name) for name in names}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=("ppo_clip", "nll"), default="ppo_clip")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=65536)
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--old-noise", type=float, default=0.1, help="std of old minus present log-probs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores")
    parser.add_argument("--only", default="", help="contenders whose names hold one of these, separated by commas")
    parser.add_argument("--out", help="another file than bench/results/head_<loss>_<device>_<dtype>.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.memory_of:
        print(json.dumps(memory_of(args)))
        return
    record = measure(args)
    path = common.write_json(f"head_{args.loss}_{args.device.split(':')[0]}_{args.dtype}", record, args.out)
    print(f"three GEMMs {record['three_gemms']['median_s']:.2f} s; clipped tokens {record['clipped_tokens']:.1%}")
    for name, row in record["contenders"].items():
        peak = row["extra_peak_mib"]
        memory = "memory unknown" if peak is None else f"{peak:7.0f} MiB"
        print(f"{name:28s} {row['median_s']:7.2f} s  {row['times_gemms']:5.2f} x GEMMs  {memory}")
        print(f"{'':30s}{row['error_vs_float64']}")
    print(path)


if __name__ == "__main__":
    main()
