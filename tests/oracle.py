"""What the operators and losses are held against: materialised logits in plain torch, and each paper's formula.

Written on its own, from the definitions: nothing here calls fastrl's operators, objectives or aggregation (Watch, which
counts what a call costs, looks into the operators).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.ops import custom, rows_native

DIFFERENTIABLE = ("logprobs", "entropy", "logsumexp")
EVERY_STAT = (*DIFFERENTIABLE, "log_sum_sq_probs", "is_argmax")


# -- a head call ---------------------------------------------------------------------------------------------------
@dataclass
class Problem:
    """hidden [N, H], weight [V, H], bias [V] or None, targets [N], and the options of the head."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    bias: Tensor | None = None
    options: dict = field(default_factory=dict)
    upstream: dict = field(default_factory=dict)  # statistic -> [N] float64

    def leaves(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """Fresh leaves (hidden, weight, bias) of the same values, cast to dtype."""
        made = []
        for x in (self.hidden, self.weight, self.bias):
            made.append(None if x is None else x.detach().clone().to(dtype or x.dtype).requires_grad_())
        return made


def problem(
    seed: int = 0,
    n: int = 13,
    h: int = 16,
    v: int = 37,
    dtype=torch.float64,
    bias: bool = False,
    scale: float = 1.0,
    **options,
) -> Problem:
    """Random inputs whose values are exact in dtype. `scale` multiplies the logits."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = (scale * randn(n, h)).to(dtype), (randn(v, h) / math.sqrt(h)).to(dtype)
    targets = torch.randint(0, v, (n,), generator=g)
    b = randn(v).to(dtype) if bias else None
    if options.get("temperature") == "per_token":
        options["temperature"] = (0.3 + 2 * torch.rand(n, generator=g, dtype=torch.float64)).float().double()
    upstream = {name: randn(n) for name in DIFFERENTIABLE}
    return Problem(hidden, weight, targets, b, options, upstream)


def plain_statistics(leaves, targets: Tensor, *, temperature=1.0, logit_scale=1.0, softcap=None, ignore_index=-100):
    """Every statistic [N] by materialised logits in the dtype of the leaves; the softmax of half logits is fp32."""
    hidden, weight, bias = leaves
    z = F.linear(hidden, weight)
    z = z if z.dtype == torch.float64 else z.float()
    if bias is not None:
        z = z + bias.to(z.dtype)
    z = logit_scale * z
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    z = z / (temperature.to(z.dtype)[:, None] if isinstance(temperature, Tensor) else temperature)
    kept = targets != ignore_index
    logp = z.log_softmax(-1)
    finite = logp.masked_fill(logp == -math.inf, 0.0)
    made = {
        "logprobs": logp.gather(1, targets.clamp(min=0).long()[:, None])[:, 0],
        "entropy": -(finite * logp.exp()).sum(-1),
        "logsumexp": z.logsumexp(-1),
        "log_sum_sq_probs": (2 * logp).logsumexp(-1).detach(),
        "is_argmax": z.argmax(-1) == targets,
    }
    return {name: torch.where(kept, x, torch.zeros_like(x)) for name, x in made.items()}


def plain_run(p: Problem, dtype: torch.dtype, names=DIFFERENTIABLE):
    """(statistics, gradients of hidden, weight, bias) by materialised logits in dtype, under p.upstream."""
    leaves = p.leaves(dtype)
    stats = plain_statistics(leaves, p.targets, **p.options)
    total = sum((stats[n] * p.upstream[n].to(stats[n].dtype)).sum() for n in names)
    return {n: x.detach() for n, x in stats.items()}, gradients(total, leaves)


def gradients(total: Tensor, leaves) -> list[Tensor | None]:
    made = iter(torch.autograd.grad(total, [x for x in leaves if x is not None]))
    return [None if x is None else next(made) for x in leaves]


# -- errors --------------------------------------------------------------------------------------------------------
def errors(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Relative RMS and relative maximum error; entries that are infinite in the truth must be the same and drop out."""
    x, truth = x.detach().double(), truth.detach().double()
    assert x.shape == truth.shape, f"shape {list(x.shape)}, expected {list(truth.shape)}"
    infinite = truth.isinf()
    assert torch.equal(x[infinite], truth[infinite]), "infinite entries differ"
    x, truth = x[~infinite], truth[~infinite]
    if x.numel() == 0:
        return 0.0, 0.0
    gap, size = (x - truth).abs(), truth.abs()
    if size.max() == 0:  # the truth is exactly zero: so must ours be, but for the rounding of cancelled sums
        return float(gap.max()), float(gap.max())
    return float(gap.norm() / size.norm()), float(gap.max() / size.max())


def assert_same(name: str, x: Tensor, truth: Tensor, tolerance: float) -> None:
    rms, most = errors(x, truth)
    assert rms <= tolerance and most <= tolerance, f"{name}: relative error {rms:.2e} rms, {most:.2e} max > {tolerance}"


def assert_as_accurate(name: str, x: Tensor, plain: Tensor, truth: Tensor, k: float) -> None:
    """Rule 7: our error <= k times plain torch's in the same dtype (3 times for the maximum), floor half a unit in the
    last place of the result."""
    eps = torch.finfo(x.dtype).eps
    (rms, most), (plain_rms, plain_most) = errors(x, truth), errors(plain, truth)
    assert rms <= k * plain_rms + eps / 4, f"{name}: rms error {rms:.2e} > {k} * {plain_rms:.2e}"
    assert most <= 3 * plain_most + eps / 2, f"{name}: max error {most:.2e} > 3 * {plain_most:.2e}"


# -- cost ----------------------------------------------------------------------------------------------------------
class Watch(TorchDispatchMode):
    """Counts the multiply-adds of every GEMM, and the bytes of tensors made inside that live at the same time."""

    def __init__(self):
        super().__init__()
        self.macs, self.largest, self.peak, self.live = 0, 0, 0, {}
        self.gemm, self.entered = rows_native.gemm, 0  # torch sees nothing of the native product

    def __enter__(self):
        self.entered += 1
        rows_native.gemm = self._native
        return super().__enter__()

    def __exit__(self, *error):
        self.entered -= 1
        if not self.entered:
            rows_native.gemm = self.gemm
        return super().__exit__(*error)

    def _native(self, a: Tensor, b: Tensor, *rest, **more) -> Tensor:
        self.macs += a.numel() * b.shape[-1]
        return self.gemm(a, b, *rest, **more)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "fastrl":  # look into our own operators
            with self:
                return getattr(custom, name)._init_fn(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            a, b = [x for x in args if isinstance(x, Tensor)][-2:]
            self.macs += a.numel() * b.shape[-1]
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self._saw(x, given)
        return out

    def _saw(self, x: Tensor, given: set) -> None:
        from torch.multiprocessing.reductions import StorageWeakRef

        storage = x.untyped_storage()
        if storage._cdata in given:
            return
        self.largest = max(self.largest, x.numel() if storage.nbytes() else 0)
        self.live = {k: (ref, size) for k, (ref, size) in self.live.items() if not ref.expired()}
        self.live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))


# -- packed batches ------------------------------------------------------------------------------------------------
@dataclass
class Sequences:
    """S sequences of a step as a list of dicts of float64 [n_i] tensors (trained rows only), and the step's counts."""

    rows: list[Tensor]  # indices of the trained rows of each sequence
    columns: dict  # old, ref: [T]; advantages [T]
    group_ids: list[int]

    def part(self, name: str, i: int) -> Tensor:
        return self.columns[name][self.rows[i]]


def step(seed: int = 0, lengths=(5, 0, 3, 1, 7, 4), v: int = 37, logprobs: Tensor | None = None, spread=0.7):
    """(TokenBatch fields as a dict, Sequences): ragged, one empty, masked rows full of garbage, one ignored target.

    old_logprobs sit at chosen log-ratios, away from the clip borders so that rounding cannot move one across.
    """
    g = torch.Generator().manual_seed(seed)
    t, s = sum(lengths), len(lengths)
    randn = lambda: torch.randn(t, generator=g, dtype=torch.float64)  # noqa: E731
    d = torch.tensor([-0.9, -0.45, -0.27, -0.1, 0.0, 0.08, 0.21, 0.5, 1.6], dtype=torch.float64)
    ratio = d[torch.randint(0, len(d), (t,), generator=g)] * spread / 0.7
    base = torch.zeros(t, dtype=torch.float64) if logprobs is None else logprobs
    targets = torch.randint(0, v, (t,), generator=g)
    mask = torch.rand(t, generator=g) < 0.75
    ignored = int(mask.nonzero()[1])
    kept = mask.clone()
    kept[ignored] = False
    columns = {"old": base - ratio, "ref": base - 0.4 * randn(), "advantages": randn()}
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    rows = [kept[a:b].nonzero()[:, 0] + a for a, b in zip(ends, ends[1:], strict=False)]
    targets[ignored] = -100
    garbage = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64).repeat(t)[:t]
    given = {k: torch.where(kept, x, garbage) for k, x in columns.items()}
    fields = {
        "targets": targets,
        "mask": mask,
        "cu_seqlens": torch.tensor(ends, dtype=torch.int32),
        "advantages": given["advantages"],
        "old_logprobs": given["old"],
        "ref_logprobs": given["ref"],
        "group_ids": torch.tensor([7, 3, 7, 3, 3, 9])[:s] if s <= 6 else torch.arange(s) // 2,
    }
    return fields, Sequences(rows, columns, fields["group_ids"].tolist())


def aggregate_of(values: list[Tensor], how: str, sequences: Sequences, max_length: int | None = None) -> Tensor:
    """Sum over sequences of their [n_i] values, divided as each aggregation is defined."""
    tokens, count = sum(len(v) for v in values), len(values)
    total = torch.zeros((), dtype=values[0].dtype)
    for v, group in zip(values, sequences.group_ids, strict=True):
        if len(v) == 0:
            continue
        if how == "token_mean":
            total = total + v.sum() / tokens
        elif how == "sequence_mean_token_mean":
            total = total + v.mean() / count
        elif how == "sequence_mean_token_sum":
            total = total + v.sum() / count
        elif how == "constant":
            total = total + v.sum() / (count * max_length)
        elif how == "prompt_mean":
            whole = sum(len(u) for u, other in zip(values, sequences.group_ids, strict=True) if other == group)
            total = total + v.sum() / (whole * len(set(sequences.group_ids)))
    return total


# -- the papers' formulas: (log pi [n], entropy [n], sequences, i, options) -> loss of each token [n] ----------------
def kl_term(kind: str, logp: Tensor, ref: Tensor) -> Tensor:
    log_r = ref - logp  # Schulman 2020: r = ref / pi
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": torch.exp(log_r) - 1 - log_r}[kind]


def _extras(loss, logp, entropy, sequences, i, o):
    if o.get("kl_coef"):
        loss = loss + o["kl_coef"] * kl_term(o.get("kl", "k3"), logp, sequences.part("ref", i).to(logp.dtype))
    return loss - o.get("entropy_coef", 0.0) * entropy if o.get("entropy_coef") else loss


def _nll(logp, entropy, sequences, i, o):
    return -logp


def _reinforce(logp, entropy, sequences, i, o):
    advantage = sequences.part("advantages", i).to(logp.dtype)
    return _extras(-advantage * logp, logp, entropy, sequences, i, o)


def _clipped(logp, entropy, sequences, i, o, low=0.2, high=0.2):
    advantage, old = (sequences.part(c, i).to(logp.dtype) for c in ("advantages", "old"))
    low, high, dual = o.get("clip_low", low), o.get("clip_high", high), o.get("dual_clip")
    ratio = torch.exp(logp - old)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
    if dual is not None:
        gain = torch.where(advantage < 0, torch.maximum(gain, dual * advantage), gain)
    return _extras(-gain, logp, entropy, sequences, i, o)


def _dapo(*args):
    return _clipped(*args, high=0.28)


def _dpo(logps: list[Tensor], sequences: Sequences, o: dict) -> Tensor:
    """Mean over pairs of -log sigmoid(beta (chosen log-ratio - rejected log-ratio)), labels smoothed."""
    free = o.get("reference_free", False)
    gain = [x.sum() - (0 if free else sequences.part("ref", i).to(x.dtype).sum()) for i, x in enumerate(logps)]
    eps, losses = o.get("label_smoothing", 0.0), []
    for chosen, rejected in zip(gain[0::2], gain[1::2], strict=True):
        m = o.get("beta", 0.1) * (chosen - rejected)
        rest = torch.log1p(torch.exp(-m.abs()))  # -log sigmoid(m) = relu(-m) + log(1 + e^-|m|)
        losses.append((1 - eps) * (torch.relu(-m) + rest) + eps * (torch.relu(m) + rest))
    return torch.stack(losses).mean()


TOKEN_LAWS: dict[str, tuple[Callable, str]] = {
    "nll": (_nll, "token_mean"),
    "reinforce": (_reinforce, "token_mean"),
    "ppo_clip": (_clipped, "token_mean"),
    "grpo": (_clipped, "sequence_mean_token_mean"),
    "dapo": (_dapo, "token_mean"),
    "dr_grpo": (_clipped, "constant"),
}
WHOLE_LAWS: dict[str, Callable] = {"dpo": _dpo}


def paper_loss(name: str, stats: dict, sequences: Sequences, options: dict, aggregate: str | None = None) -> Tensor:
    """Scalar loss of the method `name` by its paper, from per-row statistics of all T rows."""
    logps, entropies = ([stats[k][r] for r in sequences.rows] for k in ("logprobs", "entropy"))
    if name in WHOLE_LAWS:
        return WHOLE_LAWS[name](logps, sequences, options)
    if name not in TOKEN_LAWS:
        raise AssertionError(f"loss {name!r} has no formula in tests/oracle.py: write it there, from the paper")
    law, default = TOKEN_LAWS[name]
    values = [law(x, h, sequences, i, options) for i, (x, h) in enumerate(zip(logps, entropies, strict=True))]
    return aggregate_of(values, aggregate or default, sequences, options.get("max_length"))


def with_garbage(p: Problem, fields: dict) -> Problem:
    """The same problem for this step's targets, with NaN and inf in the hidden states of untrained rows."""
    kept = fields["mask"] & (fields["targets"] != -100)
    hidden = p.hidden.clone()
    hidden[~kept] = (
        torch.tensor([math.nan, math.inf, -math.inf]).repeat(hidden.shape[1])[: hidden.shape[1]].to(hidden.dtype)
    )
    return dataclasses.replace(p, hidden=hidden, targets=fields["targets"])
