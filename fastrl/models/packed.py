"""A transformers causal LM that reads packed sequences: body by boundaries, head as a fused module."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.models.attention import NAMES, UnsupportedModelError, register
from fastrl.models.head import LMHead, install_head
from fastrl.models.packing import Packing
from fastrl.objective import LossOutput, Objective
from fastrl.tokens import TokenBatch, TokenStats


class PackedModel(nn.Module):
    """Wraps a causal LM; `model` is transformers' own, unchanged but for its head module.

    packed: several sequences go through the body in one call; False where the architecture mixes them up (state-space
    layers, unknown attention): then each sequence is run by itself, which is exact and slower.
    notes: lines for the reader. Make one with `load_causal_lm` or `pack_model`, which check it against transformers.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        install_head(model)
        self.model = model
        self.packed = model.config._attn_implementation in NAMES.values()
        self.notes: list[str] = []
        self._covered: str | None = None  # the implementation that packed attention took the place of

    # -- parts --------------------------------------------------------------------------------------------------------
    @property
    def head(self) -> LMHead:
        head = self.model.get_output_embeddings()
        if not isinstance(head, LMHead):
            raise UnsupportedModelError(
                f"the LM head of {self.name} has become a {type(head).__name__}, which the fused operators would not "
                "see; leave lm_head out of the modules that are wrapped (LoRA target_modules, modules_to_save)"
            )
        return head

    @property
    def body(self) -> nn.Module:
        """Everything up to and with the final norm."""
        body = self.model.get_decoder()
        return self.model.model if body is self.model else body

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def context_length(self) -> int | None:
        """Tokens the model has positions for, or None if its config does not say."""
        config = self.model.config.get_text_config()
        return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)

    # -- what a trainer calls -----------------------------------------------------------------------------------------
    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, *, rows: Tensor | None = None, **head_call: Any) -> Any:
        """Body, then the head if it is asked for anything: the one entry, so that hooks on this module see every call.

        Args:
            input_ids: [T] int. cu_seqlens: [S+1] int boundaries from 0 to T; one on the CPU saves a device sync.
            rows: [R] int, the positions of which hidden states are wanted; None means all.
            head_call: nothing -> hidden [R, H]; targets=... -> TokenStats; objective=..., batch=... -> LossOutput.

        Raises ValueError on shapes or boundaries that do not fit, or a sequence longer than the model's context.
        """
        bounds = self._check(input_ids, cu_seqlens)
        if not bounds[-1]:
            hidden = self.head.weight.new_zeros((0, self.head.in_features))
        elif self.packed:
            hidden = self._packed_body(input_ids, Packing.from_bounds(bounds, input_ids.device))
        else:
            ends = [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
            hidden = torch.cat([self.body(input_ids=input_ids[a:b][None], use_cache=False)[0][0] for a, b in ends])
        hidden = hidden if rows is None else hidden.index_select(0, rows)
        return self.head(hidden, **head_call) if head_call else hidden

    def hidden(self, input_ids: Tensor, cu_seqlens: Tensor, rows: Tensor | None = None) -> Tensor:
        """Final hidden states [T, H] of packed sequences, positions restarting at 0 in each.

        hidden[t] predicts the token after input_ids[t] in its sequence. With rows [R]: [R, H].
        """
        return self(input_ids, cu_seqlens, rows=rows)

    def logprobs(self, input_ids: Tensor, cu_seqlens: Tensor, mask: Tensor | None = None, **options: Any) -> TokenStats:
        """Statistics [T] of the token after each position; 0 in the last row of a sequence and where mask is False.

        mask: [T] bool, True = score this row. options: outputs, temperature, ... of `linear_logprobs`.
        """
        targets = next_tokens(input_ids, cu_seqlens)
        if mask is not None:
            targets = targets.masked_fill(~mask, -100)
        rows = (targets != -100).nonzero().squeeze(1)
        stats = self(input_ids, cu_seqlens, rows=rows, targets=targets[rows], **options)
        return stats.map(lambda x: x.new_zeros(targets.shape).index_copy(0, rows, x))

    def loss(
        self,
        objective: Objective,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        batch: TokenBatch,
        rows: Tensor | None = None,
        **options: Any,
    ) -> LossOutput:
        """The objective's loss, logits never formed.

        batch: over [T], or over the R rows given: batch.targets[r] is the token after position rows[r].
        options: temperature, outputs, aggregate, ... of `fused_loss`.
        """
        return self(input_ids, cu_seqlens, rows=rows, objective=objective, batch=batch, **options)

    # -- attention ----------------------------------------------------------------------------------------------------
    def use_packed_attention(self) -> None:
        """Let attention be told by boundaries, if the architecture goes through transformers' attention interface.

        transformers' own flash attention reads the same boundaries under its own names, and is left as it is.
        """
        register()
        config, own = self.model.config, self.model.config._attn_implementation
        if own in NAMES:
            self._covered = own
            self.model.set_attn_implementation(NAMES[own])
        self.packed = config._attn_implementation in NAMES.values() or str(own).startswith("flash_attention")
        if not self.packed:
            self.note(f"{self.name} does not go through transformers' attention interface")

    def use_plain_attention(self, why: str) -> None:
        """Back to transformers' own attention, one sequence at a time."""
        self.note(why)
        if self._covered is not None:
            self.model.set_attn_implementation(self._covered)
        self.packed = False

    def note(self, why: str) -> None:
        """Tell the reader once that this architecture is not packed."""
        note = f"{why}; running {self.name} one sequence at a time, which is exact and slower"
        self.notes.append(note)
        warnings.warn(note, stacklevel=4)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer in the backward pass (non-reentrant)."""
        if self.model.supports_gradient_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        else:
            self.notes.append(f"{self.name} does not support gradient checkpointing; training without it")

    # -- inside -------------------------------------------------------------------------------------------------------
    def _packed_body(self, input_ids: Tensor, packing: Packing) -> Tensor:
        cu, longest = packing.cu_seqlens, packing.max_seqlen
        # transformers hands a 4-D mask through as it is: it builds none of its own, and packed attention reads none.
        ours = self.model.config._attn_implementation in NAMES.values()
        mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=input_ids.device) if ours else None
        return self.body(
            input_ids=input_ids[None],
            attention_mask=mask,
            position_ids=packing.position_ids[None],
            use_cache=False,
            packing=packing,
            # transformers' own names: flash attention and some linear-attention layers read these.
            cu_seq_lens_q=cu,
            cu_seq_lens_k=cu,
            max_length_q=longest,
            max_length_k=longest,
        )[0][0]

    def _check(self, input_ids: Tensor, cu_seqlens: Tensor) -> tuple[int, ...]:
        if input_ids.dim() != 1 or cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
            raise ValueError(
                f"input_ids is {list(input_ids.shape)} and cu_seqlens {list(cu_seqlens.shape)}; expected [T] and [S+1]"
            )
        bounds = tuple(cu_seqlens.tolist())
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        if bounds[0] != 0 or bounds[-1] != input_ids.shape[0] or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens must rise from 0 to T={input_ids.shape[0]}, got {list(bounds[:4])} ... {bounds[-1]}"
            )
        longest, context = max(lengths, default=0), self.context_length
        if context is not None and longest > context:
            at = lengths.index(longest)
            raise ValueError(
                f"sequence {at} has {longest} tokens but {self.name} has positions for {context}; drop or cut it first"
            )
        return bounds


def next_tokens(input_ids: Tensor, cu_seqlens: Tensor, ignore_index: int = -100) -> Tensor:
    """[T] the token after each position within its sequence; ignore_index in the last row of each."""
    targets = torch.cat([input_ids[1:], input_ids[:1]])
    last = cu_seqlens[1:].to(input_ids.device).long() - 1
    filled = cu_seqlens.diff().to(input_ids.device) > 0
    return targets.index_fill(0, last[filled], ignore_index)
