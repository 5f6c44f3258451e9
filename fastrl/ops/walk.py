"""The head on the CPU (and, without Triton, anywhere): GEMMs of library speed, the logits a tile at a time.

Logits lie transposed, [words, tokens]: W @ h^T reads both operands as they are, and a tile of some thousand words is
folded into the state of its tokens (fastrl.ops.rows) while it is still in cache.

forward     every token at once, one tile of words after another: 1 GEMM, nothing kept
backward    a tile of words at a time: dlogits, then dW of those words (written once where every token is there) and
            its share of dH. The tile's logits come from the cache of the forward or, for other tokens, from a GEMM
one pass    tokens in chunks whose logits [V, C] are kept; the chunk's backward goes along with the next one's forward,
            tile by tile, in the same memory: 3 GEMMs

The row work itself is a parameter: fastrl.ops.rows_torch or fastrl.ops.rows_native.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastrl.ops.head import Coefs, HeadSpec, Plan, Saved, accumulation_dtype
from fastrl.ops.rows import Law, State, finish, new_state, row_law
from fastrl.tokens import TokenStats

CACHE_BYTES = {"cpu": 18 << 20}  # of a tile, its dlogits, its words' W and dW; measured where 32 MiB are shared
OWN_BYTES = 24 << 20  # the same with our own GEMM
WIDENED_BYTES = {"cpu": 8 << 20}  # of a half-precision W held in the accumulation dtype at once
GPU_BYTES = 256 << 20
LEAST_WORDS = 256  # of a tile
# Of a batch-invariant forward: rows are padded to a multiple of so many, and a GEMM whose bits depend on its shape has
# this one always.
INVARIANT_ROWS, INVARIANT_WORDS = 64, 2048
INVARIANT_MOST = 1 << 14  # rows at once: torch cuts longer vectors among its threads anywhere
Coefficient = Callable[[int, int, TokenStats], Coefs]
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def statistics(
    rows: ModuleType, head: HeadSpec, hidden: Tensor, targets: Tensor, outputs: tuple, plan: Plan, cache: bool = False
) -> tuple[TokenStats, Saved, Tensor | None]:
    """Forward: 1 GEMM. Every field [N].

    With `cache`, as many of the last rows as fit the workspace keep their raw logits [V, K] (bias not added).
    """
    n = hidden.shape[0]
    walk = Walk(rows, head, hidden, plan)
    kept = min(n, walk.capacity) if cache else 0
    # The same pieces as one_pass takes: the log-probs are the same bits, and ratios between the two are exactly 1.
    parts = [walk.forward(a, b, targets, outputs) for a, b in pieces(n - kept, walk.capacity)]
    logits = None
    if kept:
        last = walk.keeping(n - kept, n, targets, outputs)
        parts.append(last.finish())
        logits = last.logits
    return *concatenate(parts, outputs, hidden), logits


def gradients(
    rows: ModuleType, head: HeadSpec, hidden: Tensor, targets: Tensor, saved: Saved, coefs: Coefs, needs: tuple,
    plan: Plan, kept: Tensor | None = None,
) -> Grads:  # fmt: skip
    """Backward of the rows with a nonzero coefficient; logits that the forward did not keep are made again."""
    walk = Walk(rows, head, hidden, plan)
    grads = Gradients(walk, needs, once=True)
    n = hidden.shape[0]
    border = n if kept is None else n - min(n, walk.capacity)
    kept = None if kept is None else kept[:, : n - border]  # the forward's walk was the same; what follows is padding
    chosen = coefs.nonzero_rows()
    lost, held = chosen[chosen < border], chosen[chosen >= border]
    law = row_law(head, saved, coefs)
    sources = [walk.source(lost[a:b], targets, law) for a, b in spans(lost.shape[0], walk.width)]
    if held.shape[0]:
        sources.append(walk.source(held, targets, law, kept, border, n))
    grads.add(sources)
    return grads.finish()


def one_pass(
    rows: ModuleType, head: HeadSpec, hidden: Tensor, targets: Tensor, outputs: tuple, coefficient: Coefficient,
    needs: tuple, plan: Plan, units: list[int] | None = None,
) -> tuple[TokenStats, Tensor | None, Tensor | None, Tensor | None, Saved]:  # fmt: skip
    """Gradients in the forward. `coefficient(start, stop, stats)` gives the Coefs of those rows.

    units: boundaries [0, ..., N] of the row ranges whose coefficients need one another (sequences, pairs); None: each
    row stands alone. A unit whose logits fit the workspace takes 3 GEMMs (2 with a frozen head); of a larger one, the
    last rows' logits are kept and the others made again.
    """
    walk = Walk(rows, head, hidden, plan)
    grads = Gradients(walk, needs)
    parts, ahead = [], None
    ranges = list(pieces(hidden.shape[0], walk.capacity, units))
    walk.reserve(max((min(b - a, walk.capacity) for a, b in ranges), default=0))
    for i, (a, b) in enumerate(ranges):
        border = max(a, b - walk.capacity)
        held_rows = walk.keeping(border, b, targets, outputs) if ahead is None else ahead
        made = [walk.forward(c, d, targets, outputs) for c, d in spans(border - a, walk.capacity, a)]
        last = held_rows.finish()
        stats, saved = concatenate([*made, last], outputs, hidden)
        parts.append((stats, saved))
        coefs = coefficient(a, b, stats)
        # The next piece's forward goes along with this one's backward, in the memory of the logits that are done with.
        ahead = None
        if i + 1 < len(ranges):
            c, d = ranges[i + 1]
            ahead = walk.keeping(max(c, d - walk.capacity), d, targets, outputs)
        chosen = coefs.nonzero_rows()
        if chosen.shape[0] == 0 or not any(needs):
            continue
        law = row_law(head.at_rows(slice(a, b)), saved, coefs)
        lost, held = chosen[chosen < border - a], chosen[chosen >= border - a]
        sources = [walk.source(lost[c:d], targets, law, start=a) for c, d in spans(lost.shape[0], walk.width)]
        if held.shape[0]:
            sources.append(walk.source(held, targets, law, held_rows.logits, border, b, start=a))
        grads.add(sources, ahead)
    stats, saved = concatenate(parts, outputs, hidden)
    return stats, *grads.finish(), saved


def pieces(n: int, capacity: int, units: list[int] | None = None) -> Iterator[tuple[int, int]]:
    """Row ranges that go through the head together: as many whole units as fit, or one unit that does not."""
    if units is None:
        even = -(-n // max(1, -(-n // capacity)))
        yield from spans(n, min(capacity, -(-even // 16) * 16))
        return
    begin = 0
    for a, b in zip(units, units[1:], strict=False):
        if b - begin > capacity and a > begin:
            yield begin, a
            begin = a
    if n > begin:
        yield begin, n


def spans(n: int, step: int, start: int = 0) -> Iterator[tuple[int, int]]:
    return ((a, min(a + step, start + n)) for a in range(start, start + n, max(1, step)))


# -- tiles, buffers and GEMMs --------------------------------------------------------------------------------------
@dataclass
class Source:
    """K rows of the backward: hidden [K, H], targets [K], head and law of these rows, and where their dH goes.

    logits [V, C] with columns `keep` [K] (None: all), or None: to be made again.
    """

    hidden: Tensor
    targets: Tensor
    head: HeadSpec
    law: Law
    rows: Tensor | slice
    logits: Tensor | None
    keep: Tensor | None


class Walk:
    """The plan of one call: tiles of words, rows at a time, and the buffers.

    GEMMs are in place or `out=`: no hidden copies, and torch.autocast, which rounds the others, leaves them alone.
    """

    def __init__(self, rows: ModuleType, head: HeadSpec, hidden: Tensor, plan: Plan):
        workspace, self.plan = plan.workspace, plan
        self.rows, self.head, self.hidden = rows, head, hidden
        self.acc = accumulation_dtype(hidden.dtype)
        self.like = hidden.new_empty(0, dtype=self.acc)
        device, size, v = hidden.device.type, self.acc.itemsize, head.weight.shape[0]
        # bf16 GEMMs accumulate in fp32 on a GPU. Elsewhere, and for fp16 (whose range the gradients leave), tiles of W
        # are widened one at a time, so that no fp32 copy of W ever exists.
        self.narrow = hidden.dtype == torch.bfloat16 and device != "cpu"
        self.own = device == "cpu" and self.acc == torch.float32 and rows.own_gemm()
        tile = min(3 << 20 if device == "cpu" else GPU_BYTES, max(workspace // 16, 1))
        self.vocabulary = v if plan.shard is None else plan.shard.vocabulary
        self.offset = 0 if plan.shard is None else plan.shard.offset
        widest = v if plan.shard is None else plan.shard.widest  # ranks must agree on the chunks
        self.capacity = self._columns((workspace - 2 * tile) // (size * max(widest, 1)))
        # Rows that a backward takes together: as many as leave a tile 512 words.
        self.width = self._columns(max(16, workspace // 8 // (size * min(512, max(widest, 1)))))
        self.fixed = plan.invariant and not self.own
        if plan.invariant:
            most = INVARIANT_ROWS if self.fixed else INVARIANT_MOST
            self.capacity, self.width = (min(most, max(INVARIANT_ROWS, x)) for x in (self.capacity, self.width))
            self.capacity = self.capacity // INVARIANT_ROWS * INVARIANT_ROWS
        self.tile_elements = max(2 * tile, 1) // size
        self.cached = (OWN_BYTES if self.own else CACHE_BYTES.get(device, 8 * GPU_BYTES)) // (2 * size)
        self.widened = WIDENED_BYTES.get(device, GPU_BYTES) // (size * max(1, hidden.shape[1]))
        self.buffer: Tensor | None = None
        self.room: Tensor | None = None

    def _columns(self, most: int) -> int:
        """At most that many, a multiple of the rows' pitch where it is more than one of them."""
        pitch = max(self.rows.PITCH, 1)
        return max(1, min(most // pitch * pitch or most, max(1, self.hidden.shape[0])))

    def pitch(self, columns: int) -> int:
        return -(-columns // self.rows.PITCH) * self.rows.PITCH

    def tiles(self, columns: int) -> Iterator[tuple[int, int]]:
        """Word ranges whose logits of that many tokens are a tile."""
        v = self.head.weight.shape[0]
        if self.fixed:
            return spans(v, INVARIANT_WORDS)
        words = min(self.cached // (columns + self.hidden.shape[1] + 1), self.tile_elements // max(1, columns))
        words = max(LEAST_WORDS, words)
        if self.hidden.dtype != self.acc and not self.narrow:
            words = min(words, max(1, self.widened))
        part = self.rows.PART if words >= self.rows.PART else 1
        words = words // part * part
        count = max(1, -(-v // words))
        return spans(v, -(-v // (count * part)) * part)

    def weight(self, a: int, b: int) -> Tensor:
        w = self.head.weight[a:b]
        return w if self.narrow else w.to(self.acc)

    def bias(self, a: int, b: int) -> Tensor | None:
        return None if self.head.bias is None else self.head.bias[a:b].to(self.acc)

    def wide(self, hidden: Tensor) -> Tensor:
        return hidden if self.narrow else hidden.to(self.acc)

    def mm(self, a: Tensor, b: Tensor, out: Tensor, beta: int = 0) -> Tensor:
        """out (+)= a @ b in the accumulation dtype."""
        if self.own:
            return self.rows.gemm(a, b, out, beta == 1)
        if not self.narrow:
            return torch.mm(a, b, out=out) if beta == 0 else out.addmm_(a, b)
        a, b = a.to(self.hidden.dtype), b.to(self.hidden.dtype)
        if beta == 0:
            return torch.mm(a, b, out_dtype=self.acc, out=out)
        return out.add_(torch.mm(a, b, out_dtype=self.acc))

    def scratch(self, words: int, columns: int) -> Tensor:
        """[words, columns] of reused memory with the pitch that the row work asks for; its pads hold anything."""
        pitch = self.pitch(columns)
        if self.room is None or self.room.numel() < words * pitch:
            self.room = self.like.new_empty(words * pitch)
        return self.room[: words * pitch].view(words, pitch)[:, :columns]

    def forward(self, a: int, b: int, targets: Tensor, outputs: tuple) -> tuple[TokenStats, Saved]:
        """(TokenStats, Saved) of rows [a, b); their logits are dropped tile by tile."""
        return Forward(self, a, b, targets, outputs).finish()

    def keeping(self, a: int, b: int, targets: Tensor, outputs: tuple) -> Forward:
        """The forward of rows [a, b), not begun; its raw logits [V, b - a] will lie in the one buffer of this walk."""
        return Forward(self, a, b, targets, outputs, self.reserve(b - a))

    def reserve(self, columns: int) -> Tensor:
        """[V, columns] of the buffer. Rows keep the pitch of the widest call, so that a later piece's logits of a tile
        lie where those of an earlier piece did."""
        columns = columns + -columns % INVARIANT_ROWS if self.plan.invariant else columns
        v, pitch = self.head.weight.shape[0], self.pitch(columns)
        if self.buffer is None or self.buffer.shape[1] < pitch:
            self.buffer = None
            self.buffer = self.like.new_empty((v, pitch))
        return self.buffer[:, :columns]

    def source(
        self, chosen: Tensor, targets: Tensor, law: Law, logits: Tensor | None = None, begin: int = 0, end: int = 0,
        start: int = 0,
    ) -> Source:  # fmt: skip
        """The rows start + chosen of this call; law's rows count from `start`, logits hold rows [begin, end)."""
        chosen = chosen.contiguous()
        rows = chosen + start
        keep = None
        if logits is not None and chosen.shape[0] < end - begin:
            keep = (rows - begin).contiguous()
        whole = chosen.shape[0] == self.hidden.shape[0]
        if keep is None and logits is not None:
            rows = slice(begin, end)
        elif whole:
            rows = slice(0, chosen.shape[0])
        h = self.wide(self.hidden[rows])
        return Source(h, targets[rows], self.head.at_rows(rows), law.at_rows(chosen), rows, logits, keep)


class Forward:
    """The forward of rows [a, b): state after state, a tile of words at a time, in order.

    logits: [V, b - a] raw, where `into` is given; else they are dropped with their tile.
    """

    def __init__(self, walk: Walk, a: int, b: int, targets: Tensor, outputs: tuple, into: Tensor | None = None):
        self.walk, self.outputs, self.into, self.count = walk, outputs, into, b - a
        head, own, h = walk.head.at_rows(slice(a, b)), targets[a:b], walk.wide(walk.hidden[a:b])
        if walk.plan.invariant:
            head, own, h = _padded(head, own, h)
        self.head, self.own, self.hidden = head, own, h
        self.state = new_state(walk.pitch(h.shape[0]), walk.like)
        self.tiles = list(walk.tiles(h.shape[0]))
        self.words = max((d - c for c, d in self.tiles), default=0)
        self.next = 0
        self.work = None

    @property
    def logits(self) -> Tensor | None:
        return None if self.into is None else self.into[:, : self.count]

    def step(self) -> None:
        """The next tile."""
        walk, columns, (c, d) = self.walk, self.hidden.shape[0], self.tiles[self.next]
        if self.work is None:
            self.work = walk.rows.Rows(self.words, columns, walk.like)
        z = walk.scratch(d - c, columns) if self.into is None else self.into[c:d]
        z = walk.mm(walk.weight(c, d), self.hidden.t(), z)
        self.state = self.work.fold(
            self.state, z, self.head, walk.bias(c, d), self.own, walk.offset + c, self.outputs
        )
        self.next += 1

    def finish(self) -> tuple[TokenStats, Saved]:
        """(TokenStats, Saved) after the tiles that are left."""
        while self.next < len(self.tiles):
            self.step()
        walk = self.walk
        state = State(*(x[: self.hidden.shape[0]] for x in self.state.tensors()))
        if walk.plan.shard is not None:
            state = walk.plan.shard.join(state)
        stats, saved = finish(state, self.own, walk.vocabulary, self.outputs)
        self.work = None
        return stats.map(lambda x: x[: self.count]), saved.at_rows(slice(0, self.count))


class Gradients:
    """Accumulates dH, dW and db in the accumulation dtype; `finish` casts once.

    once: all rows come in one `add`, so that each tile of a half-precision dW is complete when it is left: it is
    rounded there, and a dW in the accumulation dtype never exists.
    """

    def __init__(self, walk: Walk, needs: tuple[bool, bool, bool], once: bool = False):
        self.walk, self.once = walk, once and walk.head.weight.dtype != walk.acc
        h, w = walk.hidden, walk.head.weight
        self.d_hidden = h.new_zeros(h.shape, dtype=walk.acc) if needs[0] else None
        self.d_bias = w.new_zeros(w.shape[0], dtype=walk.acc) if needs[2] else None
        self.needs = needs
        self.d_weight: Tensor | None = None
        self.fresh = True

    def add(self, sources: list[Source], ahead: Forward | None = None) -> None:
        """Take in these rows, a tile of words at a time.

        ahead: a forward whose tiles each follow this backward's: W is read once for both while it is in cache, and its
        logits take the place of those that the backward has used.
        """
        if not sources:
            return
        walk = self.walk
        weight = walk.head.weight
        if self.needs[1] and self.d_weight is None:
            self.d_weight = weight.new_empty(weight.shape, dtype=weight.dtype if self.once else walk.acc)
        widest = max(s.hidden.shape[0] for s in sources)
        if ahead is not None and ahead.words > max(LEAST_WORDS, walk.tile_elements // widest):
            ahead = None  # of few rows: its tiles are too many words for these
        spread = list(walk.tiles(widest)) if ahead is None else ahead.tiles
        words = max((b - a for a, b in spread), default=0)
        work = walk.rows.Rows(words, widest, walk.like)
        shares = [None if self.d_hidden is None else self._share(s) for s in sources]
        slab = walk.like.new_empty((words, weight.shape[1])) if self.needs[1] and self.once else None
        sums = None if self.d_hidden is None else walk.like.new_empty((widest, weight.shape[1]))
        for a, b in spread:
            w = walk.weight(a, b)
            d_w = None
            if self.needs[1]:
                d_w = self.d_weight[a:b] if slab is None else slab[: b - a]
            for i, source in enumerate(sources):
                dz = self._dlogits(source, w, a, b, work)
                if self.d_bias is not None:
                    self.d_bias[a:b] += dz.sum(1)
                if d_w is not None:
                    walk.mm(dz, source.hidden, d_w, 0 if self.fresh and i == 0 else 1)
                if shares[i] is not None:
                    # Not added in the GEMM: libraries may sum term by term onto what is there, and lose small ones.
                    part = walk.mm(dz.t(), w, sums[: shares[i].shape[0]])
                    shares[i].add_(part)
            if slab is not None:
                self.d_weight[a:b] = d_w
            if ahead is not None:
                ahead.step()
        self.fresh = False
        for source, share in zip(sources, shares, strict=True):
            if share is not None and not isinstance(source.rows, slice):
                self.d_hidden[source.rows] = share

    def _share(self, source: Source) -> Tensor:
        """Where the dH of these rows is summed: in place if they stand side by side."""
        if isinstance(source.rows, slice):
            return self.d_hidden[source.rows]
        return self.d_hidden.new_zeros((source.rows.shape[0], self.d_hidden.shape[1]))

    def _dlogits(self, source: Source, w: Tensor, a: int, b: int, work) -> Tensor:
        """dL/d(raw logits) [b - a, K] of words [a, b)."""
        walk, k = self.walk, source.hidden.shape[0]
        out = walk.scratch(b - a, k)
        if source.logits is None:
            raw = walk.mm(w, source.hidden.t(), out)
        else:
            raw = source.logits[a:b]
        own = source.head, walk.bias(a, b), source.targets, walk.offset + a, source.law, source.keep
        work.dlogits(raw, *own, out)
        return out

    def finish(self) -> Grads:
        """(dH, dW, db) in the dtypes of their inputs, None where not asked for."""
        head, shard = self.walk.head, self.walk.plan.shard
        if shard is not None and self.d_hidden is not None:
            shard.sum(self.d_hidden)
        if self.needs[1] and self.d_weight is None:
            self.d_weight = head.weight.new_zeros(head.weight.shape, dtype=self.walk.acc)
        like = (self.walk.hidden, head.weight, head.bias)
        made = (self.d_hidden, self.d_weight, self.d_bias)
        return tuple(None if d is None else d.to(x.dtype) for d, x in zip(made, like, strict=True))


def _padded(head: HeadSpec, targets: Tensor, hidden: Tensor) -> tuple[HeadSpec, Tensor, Tensor]:
    """The rows and zeros up to a multiple of INVARIANT_ROWS, in one layout: GEMMs, and what follows them in
    vectors with another code for what is left over, then treat a row alike wherever it stands."""
    more = -hidden.shape[0] % INVARIANT_ROWS
    if isinstance(head.temperature, Tensor):
        temperature = torch.nn.functional.pad(head.temperature, (0, more), value=1.0)
        head = dataclasses.replace(head, temperature=temperature)
    hidden = torch.nn.functional.pad(hidden, (0, 0, 0, more)).contiguous()
    return head, torch.nn.functional.pad(targets, (0, more)), hidden


def concatenate(parts: list, outputs: tuple, like: Tensor) -> tuple[TokenStats, Saved]:
    """Join per-chunk (TokenStats, Saved) along the rows; with no rows, make empty ones."""
    if len(parts) == 1:
        return parts[0]
    if not parts:
        acc = accumulation_dtype(like.dtype)
        # A tensor of its own for each, by which autograd tells the outputs apart.
        fields = {n: like.new_empty(0, dtype=torch.bool if n == "is_argmax" else acc) for n in ("logprobs", *outputs)}
        top, log_sum = like.new_empty(0, dtype=acc), like.new_empty(0, dtype=acc)
        return TokenStats(**fields), Saved(top, log_sum, fields["logprobs"], fields.get("entropy"))

    def join(pieces):
        return None if pieces[0] is None else torch.cat(pieces)

    stats = TokenStats(*(join([getattr(s, f) for s, _ in parts]) for f in TokenStats.__dataclass_fields__))
    saved = Saved(*(join([getattr(s, f) for _, s in parts]) for f in Saved.__dataclass_fields__))
    return stats, saved
