"""The row work in plain torch: fold a tile of raw logits into the state, and raw logits -> their gradient.

A tile is [words, tokens]. On the CPU it is taken in blocks that stay in cache, with scratch allocated once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.ops.head import HeadSpec
from fastrl.ops.rows import FAR, Law, State, join

BLOCK_ELEMENTS = 1 << 17  # logits per block on the CPU (512 KiB in fp32)
PITCH = 1  # a row of a tile may have any length
PART = 1  # and a tile any number of words


class Rows:
    """Row work over tiles of at most `words` x `tokens` logits like `like`."""

    def __init__(self, words: int, tokens: int, like: Tensor):
        on_cpu = like.device.type == "cpu"
        self.block = min(words, max(1, BLOCK_ELEMENTS // max(1, tokens))) if on_cpu else words
        self.scratch = like.new_empty((2, self.block, tokens))

    def fold(
        self, state: State, raw: Tensor, head: HeadSpec, bias: Tensor | None, targets: Tensor, word: int, outputs: tuple
    ) -> State:
        """The state after these words too. raw [W, C], bias [W]; the first is word `word`; targets [C]."""
        for a in range(0, raw.shape[0], self.block):
            part = slice(a, min(a + self.block, raw.shape[0]))
            own = None if bias is None else bias[part]
            state = join(state, self._fold_block(raw[part], head, own, targets, word + a, outputs))
        return state

    def _fold_block(self, raw: Tensor, head: HeadSpec, bias, targets: Tensor, word: int, outputs: tuple) -> State:
        z, e = self._room(raw)
        z = _transform(raw, head, bias, z)
        top = z.amax(0)
        hit = z == top
        at = targets.long() - word
        inside = (at >= 0) & (at < raw.shape[0])
        at_target = z.gather(0, at.clamp(0, raw.shape[0] - 1).unsqueeze(0)).squeeze(0)
        zero = torch.zeros_like(top)
        first = torch.zeros_like(targets, dtype=torch.int32)
        if "is_argmax" in outputs:
            first = (hit.int().argmax(0) + word).int()
        gap = torch.sub(z, top, out=e).masked_fill_(hit, 0.0)
        weighted, squares = zero, zero
        if "entropy" in outputs:
            e = torch.exp(gap, out=self._room(raw)[0]).masked_fill_(hit, 0.0)
            weighted = -gap.clamp_(min=-FAR).mul_(e).sum(0)
        else:
            e = gap.exp_().masked_fill_(hit, 0.0)
        if "log_sum_sq_probs" in outputs:
            squares = e.square().sum(0)
        return State(
            top, hit.sum(0, dtype=top.dtype), e.sum(0), weighted, squares,
            torch.where(inside, at_target, -torch.inf), first,
        )  # fmt: skip

    def dlogits(
        self, raw: Tensor, head: HeadSpec, bias: Tensor | None, targets: Tensor, word: int, law: Law,
        keep: Tensor | None, out: Tensor,
    ) -> None:  # fmt: skip
        """dL/d(raw) of the columns `keep` (None: all) into out [W, K]; head, targets and law are of those columns."""
        for a in range(0, raw.shape[0], self.block):
            part = slice(a, min(a + self.block, raw.shape[0]))
            own = None if bias is None else bias[part]
            source = raw[part] if keep is None else raw[part].index_select(1, keep)
            self._block_dlogits(source, head, own, targets, word + a, law, out[part])

    def _block_dlogits(self, raw: Tensor, head, bias, targets: Tensor, word: int, law: Law, out: Tensor) -> None:
        z, slope = self._room(raw)
        if head.softcap is not None:  # before `out`, which may be `raw`, is written
            slope = _tanh(raw, head, bias, slope).square_().neg_().add_(1)
        z = torch.sub(_transform(raw, head, bias, z), law.top, out=z)
        e = torch.exp(z, out=out)
        if law.fall is None:
            e.mul_(law.rise)
        else:
            e.mul_(z.clamp_(min=-FAR).mul_(law.fall).neg_().add_(law.rise))
        at = targets.long() - word
        index = at.clamp(0, raw.shape[0] - 1).unsqueeze(0)
        inside = (at >= 0) & (at < raw.shape[0])
        e.scatter_(0, index, torch.where(inside, law.at_target, e.gather(0, index)))
        if head.softcap is not None:
            e.mul_(slope)

    def _room(self, raw: Tensor) -> Tensor:
        rows, columns = raw.shape
        return self.scratch.view(2, -1)[:, : rows * columns].view(2, rows, columns)


def _transform(raw: Tensor, head: HeadSpec, bias: Tensor | None, out: Tensor) -> Tensor:
    """Logits z of raw ones [W, C], in `out`; or `raw` itself where there is nothing to do."""
    z = raw
    if head.softcap is not None:
        z = _tanh(raw, head, bias, out).mul_(head.softcap)
    else:
        if bias is not None:
            z = torch.add(z, bias.unsqueeze(1), out=out)
        if head.logit_scale != 1.0:
            z = torch.mul(z, head.logit_scale, out=out)
    if not isinstance(head.temperature, Tensor) and head.temperature == 1.0:
        return z
    return torch.div(z, head.temperature, out=out)


def _tanh(raw: Tensor, head: HeadSpec, bias: Tensor | None, out: Tensor) -> Tensor:
    z = raw if bias is None else torch.add(raw, bias.unsqueeze(1), out=out)
    return torch.mul(z, head.logit_scale / head.softcap, out=out).tanh_()


def own_gemm() -> bool:
    """There is no GEMM here but torch's."""
    return False
