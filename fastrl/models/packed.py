"""A transformers causal LM that reads packed sequences: body by boundaries, head as a fused module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrl.data.prefix import Layout
from fastrl.models.attention import NAMES, UnsupportedModelError, register
from fastrl.models.head import LMHead, install_head
from fastrl.models.packing import Packing
from fastrl.models.split import deal, head_call, split_states
from fastrl.models.ulysses import Ranks
from fastrl.objective import LossOutput, Objective
from fastrl.tokens import TokenBatch, TokenStats

if TYPE_CHECKING:
    from fastrl.models.adapters import Adapters


class PackedModel(nn.Module):
    """Wraps a causal LM; `model` is transformers' own, unchanged but for its head module.

    packed: several sequences go through the body in one call; False where the architecture mixes them up (state-space
    layers, unknown attention): then each sequence is run by itself, which is exact and slower.
    adapters: PEFT's, if there are any. notes: lines for the reader.
    split: the ranks that share every pack (fastrl.models.ulysses.split_sequences), None where each has its own.
    Make one with `load_causal_lm` or `pack_model`, which check it against transformers.
    """

    _sharing = True  # until a shared prompt is seen to give something else
    split: Ranks | None = None

    def __init__(self, model: nn.Module):
        super().__init__()
        install_head(model)
        self.model = model
        self.packed = model.config._attn_implementation in NAMES.values()
        self.adapters: Adapters | None = None  # see fastrl.models.adapters
        self.notes: list[str] = []
        self._covered: str | None = None  # the implementation that packed attention took the place of

    # -- parts --------------------------------------------------------------------------------------------------------
    @property
    def head(self) -> LMHead:
        head = self.model.get_output_embeddings()
        if not getattr(head, "takes_objective", False):
            raise UnsupportedModelError(
                f"the LM head of {self.name} has become a {type(head).__name__}, which the fused operators would not "
                "see; fastrl.models.adapters puts LoRA on it so that they do, or leave lm_head out of target_modules"
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

    @property
    def shares(self) -> bool:
        """Whether completions can see one copy of their prompt (a Layout). If not, each is given its own."""
        return self._sharing and self.packed and self.model.config._attn_implementation in NAMES.values()

    # -- what a trainer calls -----------------------------------------------------------------------------------------
    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | Layout,
        *,
        rows: Tensor | None = None,
        own_rows: bool = False,
        **asked: Any,
    ) -> Any:
        """Body, then the head if it is asked for anything: the one entry, so that hooks on this module see every call.

        Args:
            input_ids: [T] int. cu_seqlens: [S+1] int boundaries from 0 to T; one on the CPU saves a device sync. Or
                the Layout of completions that share a prompt.
            rows: [R] int, the positions of which hidden states are wanted; None means all. One may come many times.
            own_rows: of a model split over ranks, hidden states of this rank's share of the rows alone.
            asked: nothing -> hidden [R, H]; targets=... -> TokenStats; objective=..., batch=... -> LossOutput.

        Raises ValueError on shapes or boundaries that do not fit, or a sequence longer than the model's context.
        """
        bounds = self._check(input_ids, cu_seqlens)
        layout = cu_seqlens if isinstance(cu_seqlens, Layout) else None
        if self.split is not None and bounds[-1]:
            hidden, rows = split_states(self, input_ids, bounds, layout, rows)
            if asked:
                return self._split_head(hidden, rows, **asked)
            own, share = deal(hidden, rows, self.split)
            return own if own_rows else share.whole(own)
        if layout is not None and not self.shares:
            bounds, index, back = layout.expanded()
            hidden = self._states(input_ids[index.to(input_ids.device)], bounds)[back.to(input_ids.device)]
        else:
            hidden = self._states(input_ids, bounds, None if layout is None else layout.parents)
        if rows is not None:
            hidden = _rows(hidden, rows, repeated=layout is not None)
        return self.head(hidden, **asked) if asked else hidden

    def hidden(self, input_ids: Tensor, cu_seqlens: Tensor | Layout, rows: Tensor | None = None) -> Tensor:
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

    def use_own_prompts(self, why: str) -> None:
        """From here on every completion is given its own copy of the prompt."""
        self.notes.append(f"{why}; every completion of {self.name} gets its own copy, which is exact and slower")
        warnings.warn(self.notes[-1], stacklevel=4)
        self._sharing = False

    def note(self, why: str) -> None:
        """Tell the reader once that this architecture is not packed."""
        note = f"{why}; running {self.name} one sequence at a time, no prompt shared, which is exact and slower"
        self.notes.append(note)
        warnings.warn(note, stacklevel=4)

    def findings(self) -> dict[str, Any]:
        """What the checks have made of this model, as JSON."""
        return {
            "attention": self.model.config._attn_implementation,
            "covered": self._covered,
            "packed": self.packed,
            "sharing": self._sharing,
            "notes": list(self.notes),
        }

    def take_over(self, found: dict[str, Any]) -> None:
        """Be as the checks have left a model that says this of itself (`findings`)."""
        if found["attention"] != self.model.config._attn_implementation:
            register()
            self.model.set_attn_implementation(found["attention"])
        self._covered, self.packed, self._sharing = found["covered"], found["packed"], found["sharing"]
        self.notes = list(found["notes"])

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer in the backward pass (non-reentrant)."""
        if self.model.supports_gradient_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        else:
            self.notes.append(f"{self.name} does not support gradient checkpointing; training without it")

    # -- inside -------------------------------------------------------------------------------------------------------
    def _states(self, input_ids: Tensor, bounds: Sequence[int], parents: tuple[int, ...] | None = None) -> Tensor:
        """[T, H] of the segments between these bounds."""
        if not bounds[-1]:
            return self.head.weight.new_zeros((0, self.head.in_features))
        if self.packed:
            return self._packed_body(input_ids, Packing.from_bounds(tuple(bounds), input_ids.device, parents))
        ends = [(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if b > a]
        return torch.cat([self.body(input_ids=input_ids[a:b][None], use_cache=False)[0][0] for a, b in ends])

    def _split_head(self, hidden: Tensor, rows: Tensor, **asked: Any) -> TokenStats | LossOutput:
        """The head's answer for all rows [R] from this rank's slice of hidden states."""
        return head_call(self.head, hidden, rows, self.split, **asked)

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

    def _check(self, input_ids: Tensor, cu_seqlens: Tensor | Layout) -> tuple[int, ...]:
        if isinstance(cu_seqlens, Layout):
            return self._check_bounds(input_ids, cu_seqlens.bounds, cu_seqlens.before)
        if input_ids.dim() != 1 or cu_seqlens.dim() != 1 or not cu_seqlens.shape[0]:
            raise ValueError(
                f"input_ids is {list(input_ids.shape)} and cu_seqlens {list(cu_seqlens.shape)}; expected [T] and [S+1]"
            )
        bounds = tuple(cu_seqlens.tolist())
        return self._check_bounds(input_ids, bounds, (0,) * (len(bounds) - 1))

    def _check_bounds(self, input_ids: Tensor, bounds: tuple[int, ...], before: tuple[int, ...]) -> tuple[int, ...]:
        """before: tokens that a sequence sees of its prompt."""
        lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        if bounds[0] != 0 or bounds[-1] != input_ids.shape[0] or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens must rise from 0 to T={input_ids.shape[0]}, got {list(bounds[:4])} ... {bounds[-1]}"
            )
        lengths = [n + m for n, m in zip(lengths, before, strict=True)]
        longest, context = max(lengths, default=0), self.context_length
        if context is not None and longest > context:
            at = lengths.index(longest)
            raise ValueError(
                f"sequence {at} has {longest} tokens but {self.name} has positions for {context}; drop or cut it first"
            )
        return bounds


def _rows(hidden: Tensor, rows: Tensor, repeated: bool) -> Tensor:
    """hidden[rows], and of rows that come many times gradients that are added up in the same order every time.

    On CUDA index_select's backward adds with atomics; indexing sorts the rows first, and adds in float32.
    """
    return hidden[rows] if repeated and hidden.is_cuda else hidden.index_select(0, rows)


def next_tokens(input_ids: Tensor, cu_seqlens: Tensor, ignore_index: int = -100) -> Tensor:
    """[T] the token after each position within its sequence; ignore_index in the last row of each."""
    targets = torch.cat([input_ids[1:], input_ids[:1]])
    last = cu_seqlens[1:].to(input_ids.device).long() - 1
    filled = cu_seqlens.diff().to(input_ids.device) > 0
    return targets.index_fill(0, last[filled], ignore_index)
