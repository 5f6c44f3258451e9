"""The packed data that every room speaks: TokenBatch in, TokenStats out, and sums over segments.

Letters, one meaning each, repo-wide: T packed tokens, S sequences, P pairs, H hidden size, V vocabulary.
A *row* is one token position whose log-prob is asked for: `hidden[t]` predicts `targets[t]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

TOKEN_FIELDS = ("targets", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs")
SEQUENCE_FIELDS = ("labels", "group_ids", "rewards", "group_tokens")
STAT_NAMES = ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "is_argmax")
SIDE_NAMES = ("divergence", "mean_logits", "support_logits")  # made beside the walk over the head, for fused_loss alone


@dataclass
class TokenStats:
    """Per-token statistics of `softmax(z_t)`, z the scaled logits of row t. Each [...] or None if not asked for.

    logprobs          log p(y_t)                      nats, <= 0, differentiable
    entropy           -sum_v p_v log p_v              nats, in [0, log V], differentiable
    logsumexp         log sum_v exp z_v               differentiable
    log_sum_sq_probs  log sum_v p_v^2                 no gradient (WPO, optimal token baseline)
    is_argmax         z of the target is the largest  bool, no gradient
    divergence        from a teacher's softmax        nats, >= 0, differentiable (fused_loss(..., teacher=...))
    mean_logits       mean_v z_v                      differentiable (label smoothing)
    support_logits    z of k given words, [..., k]    differentiable (top-k distillation)
    """

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    is_argmax: Tensor | None = None
    divergence: Tensor | None = None
    mean_logits: Tensor | None = None
    support_logits: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> TokenStats:
        """Apply `fn` to every statistic that is present."""
        return TokenStats(**{n: fn(x) for n in (*STAT_NAMES, *SIDE_NAMES) if (x := getattr(self, n)) is not None})

    def detach(self) -> TokenStats:
        return self.map(Tensor.detach)

    @classmethod
    def joined(cls, stats: list[TokenStats]) -> TokenStats:
        """Those of several batches, one after the other."""
        present = [n for n in (*STAT_NAMES, *SIDE_NAMES) if all(getattr(s, n) is not None for s in stats)]
        return cls(**{n: torch.cat([getattr(s, n) for s in stats]) for n in present})


@dataclass
class HeadStats:
    """What a small head beside the language model says of a packed batch: reward, process reward and value models.

    Each is None where the head does not give it; all differentiable.

    scores        [S] one number a sequence, or [S, K] from K outputs
    values        [T] one number a row, or [T, K]: logits of K classes, or of K bins
    log_variance  [S] or [T]: log of the variance of the scores or values, from a mean-variance head
    """

    scores: Tensor | None = None
    values: Tensor | None = None
    log_variance: Tensor | None = None

    def __getattr__(self, name: str):
        hint = ": a loss that reads it takes log-probs, see fused_loss" if name in STAT_NAMES else ""
        raise AttributeError(f"HeadStats has no {name!r}{hint}")

    def map(self, fn: Callable[[Tensor], Tensor]) -> HeadStats:
        """Apply `fn` to every statistic that is present."""
        return HeadStats(*(None if (x := getattr(self, f.name)) is None else fn(x) for f in dataclasses.fields(self)))

    def detach(self) -> HeadStats:
        return self.map(Tensor.detach)

    @classmethod
    def joined(cls, stats: list[HeadStats]) -> HeadStats:
        """Those of several batches, one after the other."""
        names = [f.name for f in dataclasses.fields(cls)]
        present = [n for n in names if all(getattr(s, n) is not None for s in stats)]
        return cls(**{n: torch.cat([getattr(s, n) for s in stats]) for n in present})


@dataclass
class TokenBatch:
    """A packed batch: T rows of S sequences laid end to end (no padding).

    Args:
        targets: [T] int32/int64, the token predicted at each row.
        mask: [T] bool, True where the row is trained; None means every row is.
        cu_seqlens: [S+1] int32/int64 boundaries on the T axis; None means one sequence of T rows.
        advantages: [T] or [S] float (read as [T] where T == S).
        old_logprobs, ref_logprobs, rollout_logprobs: [T] float. `old_logprobs=None` means that the policy which
            sampled is the one being trained (first update after a rollout): the ratio is then exactly 1.
        labels: [S] bool, True = desirable. group_ids: [S] int, which prompt each sequence answers.
        rewards: [S] float. margins: [P] float.
        num_tokens, num_sequences: global normalisers (trained tokens, sequences) over every micro-batch and rank
            of the optimizer step; default: this batch's own counts.
        num_groups: global number of prompts (for `prompt_mean`). group_tokens: [S] trained tokens of each sequence's
            whole group over all micro-batches; default: counted in this batch.
        per_token, per_sequence: whatever else an objective reads, by name: tensors [T] and [S].
        prepared_for: the objective whose columns of the whole step are here already (fastrl.objective.prepared).

    Pairs are interleaved: sequences 2p and 2p+1 are chosen and rejected of pair p.
    """

    targets: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    labels: Tensor | None = None
    group_ids: Tensor | None = None
    rewards: Tensor | None = None
    margins: Tensor | None = None
    num_tokens: float | Tensor | None = None
    num_sequences: float | Tensor | None = None
    num_groups: float | Tensor | None = None
    group_tokens: Tensor | None = None
    per_token: dict[str, Tensor] = field(default_factory=dict)
    per_sequence: dict[str, Tensor] = field(default_factory=dict)
    prepared_for: object = None

    def __post_init__(self):
        t = self.targets.shape[0] if self.targets.dim() == 1 else -1
        if t < 0:
            raise ValueError(f"targets must be [T], got {list(self.targets.shape)}; flatten the packed batch")
        if self.targets.is_floating_point() or self.targets.dtype == torch.bool:
            raise TypeError(f"targets must be int32 or int64, got {self.targets.dtype}")
        if self.cu_seqlens is None:
            self.cu_seqlens = torch.tensor([0, t], dtype=torch.int32, device=self.targets.device)
        self._check_boundaries(t)
        if self.mask is not None and self.mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool (True = trained), got {self.mask.dtype}; use mask.bool()")
        for name in TOKEN_FIELDS[1:]:
            self._check(name, t, "T")
        s = self.num_segments
        for name in SEQUENCE_FIELDS:
            self._check(name, s, "S")
        self._check("margins", s // 2, "P")
        for where, letter, size in (("per_token", "T", t), ("per_sequence", "S", s)):
            for name, x in getattr(self, where).items():
                if x.shape[:1] != (size,):
                    raise ValueError(f"{where}[{name!r}] must be [{letter}={size}], got {list(x.shape)}")
        adv = self.advantages
        if adv is not None and (adv.dim() != 1 or adv.shape[0] not in (t, s)):
            raise ValueError(f"advantages must be [T={t}] or [S={s}], got {list(adv.shape)}")

    def _check_boundaries(self, t: int) -> None:
        """Shape and dtype everywhere; the numbers themselves on the CPU, where reading them waits for nothing."""
        cu = self.cu_seqlens
        if cu.dim() != 1 or cu.numel() < 1:
            raise ValueError(f"cu_seqlens must be [S+1], got {list(cu.shape)}")
        if cu.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu.dtype}")
        if cu.device.type != "cpu" or torch.compiler.is_compiling():
            return
        first, last = int(cu[0]), int(cu[-1])
        if first != 0 or last != t or bool((cu.diff() < 0).any()):
            raise ValueError(f"cu_seqlens must ascend from 0 to T={t}, the length of targets; got {cu.tolist()[:20]}")

    def _check(self, name: str, size: int, letter: str) -> None:
        value = getattr(self, name)
        if value is not None and (value.dim() != 1 or value.shape[0] != size):
            raise ValueError(
                f"{name} must be [{letter}={size}] to match targets and cu_seqlens, got {list(value.shape)}"
            )

    # -- shape of the pack ---------------------------------------------------------------------------------------
    @property
    def num_segments(self) -> int:
        """S, the number of sequences in this batch (empty ones included)."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """[S] rows of each sequence."""
        return self.cu_seqlens.diff().long()

    @property
    def segment_ids(self) -> Tensor:
        """[T] which sequence each row belongs to."""
        ids = torch.arange(self.num_segments, device=self.targets.device)
        return torch.repeat_interleave(ids, self.lengths, output_size=self.targets.shape[0])

    @property
    def trained(self) -> Tensor:
        """[T] bool: the mask, or all True."""
        return torch.ones_like(self.targets, dtype=torch.bool) if self.mask is None else self.mask

    @property
    def trained_lengths(self) -> Tensor:
        """[S] trained rows of each sequence, int64."""
        return self.lengths if self.mask is None else segment_sum(self.mask.long(), self)

    @property
    def token_advantages(self) -> Tensor:
        """[T] advantages: as given, or each sequence's spread over its rows."""
        if self.advantages is None:
            raise ValueError("this objective needs batch.advantages ([T] or [S]); got None")
        return self.advantages if self._is_per_token() else self.spread(self.advantages)

    def _is_per_token(self) -> bool:
        return self.advantages.shape[0] == self.targets.shape[0]

    def token(self, name: str, why: str = "this objective") -> Tensor:
        """[T] column `name` of per_token. Raises ValueError if it is not there."""
        if name not in self.per_token:
            known = ", ".join(self.per_token) or "none"
            raise ValueError(f"{why} needs batch.per_token[{name!r}] [T]; there is {known}")
        return self.per_token[name]

    def sequence(self, name: str, why: str = "this objective") -> Tensor:
        """[S] column `name` of per_sequence. Raises ValueError if it is not there."""
        if name not in self.per_sequence:
            known = ", ".join(self.per_sequence) or "none"
            raise ValueError(f"{why} needs batch.per_sequence[{name!r}] [S]; there is {known}")
        return self.per_sequence[name]

    def spread(self, per_sequence: Tensor) -> Tensor:
        """[S] -> [T]: each sequence's number on all of its rows."""
        return torch.repeat_interleave(per_sequence, self.lengths, dim=0, output_size=self.targets.shape[0])

    # -- new batches from old --------------------------------------------------------------------------------------
    @classmethod
    def joined(cls, batches: list[TokenBatch]) -> TokenBatch:
        """Several batches of one step as one: what all of them have, one after the other. Counts are the first's."""
        first = batches[0]
        if len(batches) == 1:
            return first

        def cat(name):
            parts = [getattr(b, name) for b in batches]
            return None if any(x is None for x in parts) else torch.cat(parts)

        def cat_all(where):
            shared = set.intersection(*(set(getattr(b, where)) for b in batches))
            return {n: torch.cat([getattr(b, where)[n] for b in batches]) for n in sorted(shared)}

        made = {n: cat(n) for n in (*TOKEN_FIELDS, *SEQUENCE_FIELDS, "margins")}
        if any(b.mask is not None for b in batches):
            made["mask"] = torch.cat([b.trained for b in batches])
        if all(b.advantages is not None for b in batches):
            made["advantages"] = torch.cat([b.token_advantages for b in batches])
        lengths = torch.cat([b.cu_seqlens.diff() for b in batches])
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(first.cu_seqlens.dtype)
        columns = {where: cat_all(where) for where in ("per_token", "per_sequence")}
        return dataclasses.replace(first, **made, **columns, cu_seqlens=cu_seqlens)

    def with_counts(self) -> TokenBatch:
        """Fill the normalisers that are None with this batch's own counts."""
        tokens = self.targets.shape[0] if self.mask is None else self.mask.sum()
        return dataclasses.replace(
            self,
            num_tokens=tokens if self.num_tokens is None else self.num_tokens,
            num_sequences=self.num_segments if self.num_sequences is None else self.num_sequences,
        )

    def select(self, rows: Tensor, cu_seqlens: Tensor) -> TokenBatch:
        """Keep `rows` ([T'] int, ascending); the caller gives the new boundaries. All kept rows count as trained."""
        new = {n: None if (x := getattr(self, n)) is None else x[rows] for n in TOKEN_FIELDS}
        new["per_token"] = {n: x[rows] for n, x in self.per_token.items()}
        advantages = self.advantages
        if advantages is not None:
            advantages = self.token_advantages[rows]
        return dataclasses.replace(self, **{**new, "mask": None}, cu_seqlens=cu_seqlens, advantages=advantages)

    def window(self, start: int, stop: int) -> TokenBatch:
        """Rows [start, stop) as a batch of the same S sequences, most of them now empty. Counts stay global."""
        new = {n: None if (x := getattr(self, n)) is None else x[start:stop] for n in TOKEN_FIELDS}
        new["per_token"] = {n: x[start:stop] for n, x in self.per_token.items()}
        advantages = None if self.advantages is None else self.token_advantages[start:stop]
        cu = (self.cu_seqlens - start).clamp(0, stop - start)
        return dataclasses.replace(self, **new, cu_seqlens=cu, advantages=advantages)

    def sequences(self, start: int, stop: int, first_row: int, last_row: int) -> TokenBatch:
        """Sequences [start, stop), which are rows [first_row, last_row). Counts stay global: they must be given."""
        new = {n: None if (x := getattr(self, n)) is None else x[first_row:last_row] for n in TOKEN_FIELDS}
        new["per_token"] = {n: x[first_row:last_row] for n, x in self.per_token.items()}
        for name in SEQUENCE_FIELDS:
            new[name] = None if (x := getattr(self, name)) is None else x[start:stop]
        new["per_sequence"] = {n: x[start:stop] for n, x in self.per_sequence.items()}
        margins = None if self.margins is None else self.margins[start // 2 : stop // 2]
        advantages = self.advantages
        if advantages is not None:  # [S] is read as [T] where a piece has as many rows as sequences
            by_row = self._is_per_token() or last_row - first_row == stop - start
            advantages = self.token_advantages[first_row:last_row] if by_row else advantages[start:stop]
        cu = self.cu_seqlens[start : stop + 1] - first_row
        return dataclasses.replace(self, **new, margins=margins, advantages=advantages, cu_seqlens=cu)

    def to(self, *args, **kwargs) -> TokenBatch:
        """Move every tensor (same arguments as Tensor.to with a device)."""

        def move(x):
            return x.to(*args, **kwargs) if isinstance(x, Tensor) else x

        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved = {n: {k: move(v) for k, v in x.items()} if isinstance(x, dict) else move(x) for n, x in moved.items()}
        return dataclasses.replace(self, **moved)

    def with_columns(self, per_token: dict[str, Tensor] | None = None, per_sequence: dict | None = None) -> TokenBatch:
        """The same batch with further columns."""
        return dataclasses.replace(
            self,
            per_token={**self.per_token, **(per_token or {})},
            per_sequence={**self.per_sequence, **(per_sequence or {})},
        )


def segment_sum(values: Tensor, batch: TokenBatch) -> Tensor:
    """[T] -> [S] sums over each sequence, in the order of the rows; empty sequences give 0. Differentiable."""
    out = values.new_zeros(batch.num_segments)
    return out.index_add(0, batch.segment_ids, values)


def segment_mean(values: Tensor, batch: TokenBatch) -> Tensor:
    """[T] -> [S] means over each sequence; empty sequences give 0. Differentiable."""
    return segment_sum(values, batch) / batch.lengths.clamp(min=1)


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing can be read from the device."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def trained_rows(batch: TokenBatch, ignore_index: int) -> Tensor | None:
    """[T'] indices of the rows that are trained (mask True and target not ignored), or None if all are.

    On CUDA this reads one count back to the host. While a CUDA graph is captured it cannot: without a mask every row is
    then taken as trained (a target of ignore_index gives NaN), and with one torch raises.
    """
    if batch.mask is None and capturing(batch.targets):
        return None
    keep = batch.targets != ignore_index
    if batch.mask is not None:
        keep = keep & batch.mask
    rows = keep.nonzero().squeeze(1)
    return None if rows.shape[0] == batch.targets.shape[0] else rows


def compact(batch: TokenBatch, ignore_index: int) -> tuple[TokenBatch, Tensor | None]:
    """Drop untrained rows, so that no garbage in them can reach a loss. Returns (batch, kept rows or None for all).

    Global counts are fixed before anything is dropped: num_tokens counts the trained rows either way.
    """
    rows = trained_rows(batch, ignore_index)
    if rows is None:
        return dataclasses.replace(batch, mask=None).with_counts(), None
    keep = torch.zeros_like(batch.targets, dtype=torch.int64)
    keep[rows] = 1
    ends = torch.nn.functional.pad(keep.cumsum(0), (1, 0))
    cu_seqlens = ends[batch.cu_seqlens.long()].to(batch.cu_seqlens.dtype)
    return batch.select(rows, cu_seqlens).with_counts(), rows
