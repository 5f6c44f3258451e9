"""A transformers causal LM that reads packed sequences: body by boundaries, head as a fused module."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fastrl.models.attention import NAME, Packing
from fastrl.models.head import LMHead, LogitTransform


class UnsupportedModelError(ValueError):
    """The architecture cannot be trained here: the message names it and what disagrees."""


class PackedModel(nn.Module):
    """Wraps a causal LM; `model` is transformers' own, unchanged but for its head module.

    packed: several sequences go through the body in one call; False where the architecture mixes them up (state-space
    layers, unknown attention): then each sequence is run by itself, which is exact and slower.
    notes: lines for the reader.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UnsupportedModelError(f"{type(model).__name__} has no linear LM head, got {type(head).__name__}")
        self.model = model
        model.set_output_embeddings(LMHead.from_linear(head, LogitTransform.of(model.config)))
        takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(self.body.forward).parameters.values())
        self.packed = takes_more and model.config._attn_implementation == NAME
        self.notes: list[str] = []

    @property
    def head(self) -> LMHead:
        return self.model.get_output_embeddings()

    @property
    def body(self) -> nn.Module:
        """Everything up to and with the final norm."""
        return self.model.base_model

    @property
    def name(self) -> str:
        return type(self.model).__name__

    def hidden(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Final hidden states [T, H] of packed sequences, positions restarting at 0 in each.

        input_ids: [T]. cu_seqlens: [S+1] boundaries. hidden[t] predicts the token after input_ids[t].
        """
        packing = Packing.of(cu_seqlens)
        if self.packed:
            return self._run(input_ids, packing)
        pieces = [self._run(input_ids[a:b], None) for a, b in zip(packing.bounds, packing.bounds[1:], strict=False) if b > a]
        return torch.cat(pieces)

    def _run(self, input_ids: Tensor, packing: Packing | None) -> Tensor:
        if packing is None:
            return self.body(input_ids=input_ids[None], use_cache=False).last_hidden_state[0]
        lengths = packing.cu_seqlens.diff().long()
        starts = torch.repeat_interleave(packing.cu_seqlens[:-1].long(), lengths, output_size=input_ids.shape[0])
        position_ids = torch.arange(input_ids.shape[0], device=input_ids.device) - starts
        out = self.body(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            # A 4-D mask is handed through as it is: transformers builds none, and packed attention reads none.
            attention_mask=input_ids.new_zeros((1, 1, 1, 1), dtype=torch.bool),
            use_cache=False,
            packing=packing,
        )
        return out.last_hidden_state[0]

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer in the backward pass (non-reentrant)."""
        if self.model.supports_gradient_checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        else:
            self.notes.append(f"{self.name} does not support gradient checkpointing; training without it")


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def check_parity(model: PackedModel) -> None:
    """Two short random documents, packed, against `model(...).logits` of each alone.

    A pack that mixes documents falls back to one sequence at a time, with a note. A head that disagrees even then
    (an unknown logit transform) raises UnsupportedModelError.
    """
    was_training, device = model.training, model.head.weight.device
    vocabulary = min(model.head.weight.shape[0], model.model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (16,), generator=generator).to(device)
    bounds = torch.tensor([0, 7, 16], dtype=torch.int32, device=device)
    model.eval()
    parts = [ids[0:7], ids[7:16]]
    logits = torch.cat([model.model(part[None], use_cache=False).logits[0] for part in parts])
    targets = ids.roll(-1)
    want = torch.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, -1)
    want = want.gather(1, targets[:, None]).squeeze(1)

    def gap() -> float:
        got = model.head(model.hidden(ids, bounds), targets=targets).logprobs
        return float((got - want).abs().max())

    def packed_gap() -> float:
        try:
            return gap()
        except (TypeError, ValueError, RuntimeError):  # the body takes no mask of this shape, no extra keywords, ...
            return float("inf")

    limit = TOLERANCE[model.head.weight.dtype]
    worst = packed_gap() if model.packed else gap()
    if not worst <= limit and model.packed:
        model.packed, found = False, worst
        worst = gap()
        model.notes.append(
            f"{model.name} does not keep packed sequences apart (log-probs differ by {found:.1e}); running one "
            "sequence at a time, which is exact and slower"
        )
    model.train(was_training)
    if not worst <= limit:
        raise UnsupportedModelError(
            f"log-probs of {model.name} from its hidden states and head differ from its own logits by {worst:.1e} "
            f"(allowed {limit:.0e}): the architecture transforms its logits in a way that is not known here"
        )
