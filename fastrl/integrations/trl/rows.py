"""From TRL's padded batches [B, L] to packed rows: which tokens are real, where each sequence begins, which are scored.

The body then runs over T real tokens in place of B x L. Every token keeps the position it had in the padded batch, so
that models with absolute positions see what TRL showed them, left padding included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.models.attention import NAMES, register
from fastrl.models.check import AGREES, APART, ON_DEVICE, evaluating, row_error
from fastrl.models.packing import Packing


@dataclass(frozen=True)
class RealTokens:
    """The T real tokens of a padded batch [B, L].

    flat: [T] where each stands in the batch laid out flat. packing: boundaries of the B sequences.
    """

    flat: Tensor
    packing: Packing
    shape: tuple[int, int]

    @classmethod
    def of(cls, attention_mask: Tensor) -> RealTokens | None:
        """None where there is nothing to gain (no padding) or a sequence has padding inside."""
        real = attention_mask.bool()
        runs = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
        lengths, runs = torch.stack([real.sum(1), runs]).tolist()
        if sum(lengths) in (0, real.numel()) or max(runs) > 1:
            return None
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        packing = Packing.from_bounds(tuple(bounds), real.device)
        return cls(real.reshape(-1).nonzero().squeeze(1), packing, (real.shape[0], real.shape[1]))

    @property
    def columns(self) -> Tensor:
        """[T] position of each token in its padded row."""
        return self.flat % self.shape[1]

    def places(self, flat: Tensor) -> Tensor:
        """[N] -> [N] which real token stands at these places of the flat batch; -1: padding."""
        index = torch.full((self.shape[0] * self.shape[1],), -1, dtype=torch.long, device=flat.device)
        index[self.flat] = torch.arange(self.flat.shape[0], device=flat.device)
        return index[flat]


class PackedBody:
    """Lets a model's body read packed rows through the attention of fastrl.models.attention; `close` undoes it."""

    def __init__(self, model: nn.Module):
        register()
        self.model, self.covered = model, model.config._attn_implementation
        if self.covered in NAMES:
            model.set_attn_implementation(NAMES[self.covered])
        self.ours = self.covered in NAMES or self.covered in NAMES.values()  # another trainer's patch may be there
        self.works = self.ours or str(self.covered).startswith("flash_attention")
        self.trouble = None if self.works else f"attention {self.covered!r} is not told of sequence boundaries"
        if self.works:
            self.trouble = _trouble(self)
            self.works = self.trouble is None
        if not self.works:
            self.close()

    def close(self) -> None:
        """The model's own attention again."""
        if self.covered in NAMES and self.model.config._attn_implementation == NAMES[self.covered]:
            self.model.set_attn_implementation(self.covered)

    @property
    def ready(self) -> bool:
        """Whether packed rows may come now: not after someone has set another attention."""
        now = self.model.config._attn_implementation
        return self.works and (now in NAMES.values() if self.ours else now == self.covered)

    def __call__(self, input_ids: Tensor, real: RealTokens, **others: Any) -> Tensor:
        """input_ids [B, L] -> final hidden states [T, H] of the real tokens."""
        cu, longest = real.packing.cu_seqlens, real.packing.max_seqlen
        return self.model.base_model(
            input_ids=input_ids.reshape(-1)[real.flat][None],
            # transformers hands a 4-D mask through as it is: it builds none of its own, and packed attention reads none
            attention_mask=torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device) if self.ours else None,
            position_ids=real.columns[None],
            packing=real.packing,
            cu_seq_lens_q=cu,
            cu_seq_lens_k=cu,
            max_length_q=longest,
            max_length_k=longest,
            **others,
        ).last_hidden_state[0]


def _trouble(body: PackedBody) -> str | None:
    """Why packed rows are not what the padded batch gives, in words, or None. What this short run raises counts."""
    try:
        return _difference(body)
    except Exception as error:  # the body takes no such mask, no positions, one sequence only, ...
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _difference(body: PackedBody) -> str | None:
    model, device = body.model, body.model.get_input_embeddings().weight.device
    config = model.config.get_text_config()
    near = [n for name in ("sliding_window", "attention_chunk_size") if isinstance(n := getattr(config, name, 0), int)]
    length = 9 + max([n for n in near if n <= 64], default=0)
    words = torch.randint(config.vocab_size, (2, 2, length), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones(2, length, dtype=torch.long, device=device)
    mask[0, :3] = 0  # left padding in one, right padding in the other
    mask[1, -2:] = 0
    real = RealTokens.of(mask)
    with evaluating(model):
        own = model.base_model(input_ids=words[0], attention_mask=mask, use_cache=False).last_hidden_state
        own = own.reshape(2 * length, -1)[real.flat]
        packed = body(words[0], real, use_cache=False)
        mixed = body(torch.stack([words[0, 0], words[1, 1]]), real, use_cache=False)
    limit = AGREES[own.dtype] if device.type == "cpu" else max(AGREES[own.dtype], ON_DEVICE.get(own.dtype, 0.0))
    error = row_error(packed, own)
    worst = error.max() if own.dtype in (torch.float32, torch.float64) else error.median()
    if not worst <= limit:
        return f"packed hidden states are {worst:.1e} (relative) from the padded batch's, allowed {limit:.0e}"
    first = length - 3
    leak = row_error(mixed[:first], packed[:first]).max()
    return None if leak <= APART[own.dtype] else f"packed sequences see one another ({leak:.1e} relative)"
