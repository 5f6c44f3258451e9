"""A model is believed only after it has been held against transformers: the logits, the packing, the head.

Three questions, on two short random documents. Is the body's output followed by our head what `model(...)` says? Does
changing one document leave the other as it was? Is a known ramp of raw logits transformed as we think?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrl.models.attention import UnsupportedModelError
from fastrl.models.packed import PackedModel

# Norm of a row's error over the norm of the row. Low precision adds up over the layers; a mistake is of order one.
AGREES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}
ON_DEVICE = {torch.float32: 1e-2}  # TF32
# The same for documents that must not see each other: exactly 0 but for mixtures of experts, whose groups vary.
APART = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True)
class Reference:
    """Two documents [L], their stand-ins, and transformers' own logits of each by itself, one after the other."""

    documents: tuple[Tensor, Tensor]
    others: tuple[Tensor, Tensor]
    logits: Tensor

    @classmethod
    def of(cls, model: nn.Module) -> Reference:
        """Under whatever attention the model has now."""
        device, config = model.get_input_embeddings().weight.device, model.config.get_text_config()
        vocabulary = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])
        near = [w for n in ("sliding_window", "attention_chunk_size") if isinstance(w := getattr(config, n, None), int)]
        longest = min(9 + min([w for w in near if w <= 64], default=0), getattr(config, "max_position_embeddings", 99) or 99)
        generator = torch.Generator().manual_seed(0)
        draw = [torch.randint(0, vocabulary, (n,), generator=generator).to(device) for n in (7, longest, 7, longest)]
        with evaluating(model):
            logits = torch.cat([model(ids[None], use_cache=False).logits[0] for ids in draw[:2]])
        return cls((draw[0], draw[1]), (draw[2], draw[3]), logits)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; afterwards every module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    with torch.no_grad():
        yield
    for module in training:
        module.training = True


def check_parity(packed: PackedModel, reference: Reference | None = None) -> None:
    """Hold the model against transformers' own logits (`reference`; None: as its attention gives them now).

    A pack that mixes documents, or does not run, falls back to one sequence at a time, with a note and a warning.
    Raises UnsupportedModelError if hidden states and head do not give the model's own logits even then.
    """
    reference = Reference.of(packed.model) if reference is None else reference
    with evaluating(packed):
        check_transform(packed)
        trouble = _trouble(packed, reference)
        if trouble and packed.packed:
            packed.use_plain_attention(f"packed sequences do not stay apart or do not run ({trouble})")
            trouble = _trouble(packed, reference)
    if trouble:
        raise UnsupportedModelError(f"{packed.name} cannot be trained here: {trouble}")


def _trouble(packed: PackedModel, reference: Reference) -> str | None:
    """What is wrong, in words, or None. Anything that this short run raises counts as wrong."""
    try:
        return _difference(packed, reference)
    except Exception as error:  # the body takes no such mask, no extra keywords, one sequence only, ...
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _difference(packed: PackedModel, reference: Reference) -> str | None:
    first, second = reference.documents
    length, device, dtype = first.shape[0], first.device, packed.head.weight.dtype
    cu_seqlens = torch.tensor([0, length, length + second.shape[0]], dtype=torch.int32)

    def hidden(*documents: Tensor) -> Tensor:
        return packed.hidden(torch.cat(documents), cu_seqlens)

    h = hidden(first, second)
    limit = AGREES[dtype] if device.type == "cpu" else max(AGREES[dtype], ON_DEVICE.get(dtype, 0.0))
    error = row_error(packed.head.logits(h), reference.logits)
    # In half precision a router may send a token elsewhere for a rounding error, so a few rows may differ.
    worst = error.max() if dtype in (torch.float32, torch.float64) else error.median()
    if not worst <= limit:
        return f"hidden states and head give logits {worst:.1e} (relative) from its own, allowed {limit:.0e}"
    other_first, other_second = reference.others
    leak = torch.cat([row_error(hidden(other_first, second), h)[length:], row_error(hidden(first, other_second), h)[:length]])
    if not leak.max() <= APART[dtype]:
        return f"changing one packed document changes hidden states of the other by {leak.max():.1e} (relative)"
    plain = row_error(packed.model(first[None], use_cache=False).logits[0], reference.logits[:length]).median()
    if packed.packed and not plain <= limit:
        return f"plain calls give logits {plain:.1e} (relative) from those before packing"
    return None


def row_error(got: Tensor, want: Tensor) -> Tensor:
    """[N] norm of each row's error over the norm of the row."""
    if got.shape != want.shape:
        raise UnsupportedModelError(f"logits are {list(got.shape)} from hidden states and head, but {list(want.shape)}")
    wide = torch.promote_types(want.dtype, torch.float32)
    got, want = got.to(wide), want.to(wide)
    return (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=torch.finfo(wide).tiny)


def check_transform(packed: PackedModel) -> None:
    """Put a ramp from -100 to 100 in place of the raw logits and see what the model makes of it.

    Random weights give logits too small for a cap to show; a ramp does not. Raises UnsupportedModelError.
    """
    head, device = packed.head, packed.head.weight.device
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    ramp = torch.linspace(-100, 100, head.out_features, dtype=dtype, device=device).to(head.weight.dtype)
    hook = head.register_forward_hook(lambda module, inputs, output: ramp.expand_as(output))
    made = packed.model(torch.zeros((1, 2), dtype=torch.long, device=device), use_cache=False).logits
    hook.remove()
    want = head.transform.after(ramp.to(dtype)).expand(2, -1)
    if made.shape[-1] != want.shape[-1]:
        raise UnsupportedModelError(
            f"{packed.name} drops logits after its head: {made.shape[-1]} are left of V={want.shape[-1]}"
        )
    error = row_error(made[0], want).max()
    if not error <= AGREES[head.weight.dtype]:
        raise UnsupportedModelError(
            f"{packed.name} transforms its logits after its head in a way that is not known here: {head.transform} is "
            f"{error:.1e} (relative) from what it does"
        )


def pack_model(model: nn.Module) -> PackedModel:
    """Wrap a transformers causal LM that is already in memory, checked. Raises UnsupportedModelError.

    The model keeps its weights and its name for every one of them; its head module and its attention implementation
    are replaced, with the same results for plain calls and generation.
    """
    packed = PackedModel(model)
    reference = Reference.of(model)
    packed.use_packed_attention()
    check_parity(packed, reference)
    return packed
