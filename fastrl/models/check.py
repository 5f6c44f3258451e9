"""A model is believed only after it has been held against transformers: the logits, the packing, the head.

Four questions, on two short random documents. Is the body's output followed by our head what `model(...)` says? Does
changing one document leave the other as it was? Is a known ramp of raw logits transformed as we think? Does a document
stay what it is where it shares its beginning with another one?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastrl.data.prefix import Layout
from fastrl.models.attention import UnsupportedModelError
from fastrl.models.outline import believed
from fastrl.models.packed import PackedModel

# Norm of a row's error over the norm of the row. Low precision adds up over the layers (and transformers itself rounds
# some steps of float64 to float32); a mistake is of order one.
AGREES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}
ON_DEVICE = {torch.float32: 1e-2}  # TF32
# The same for documents that must not see each other, in mixtures of experts, whose groups vary. Others: exactly 0.
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
        embedding, config = model.get_input_embeddings().weight, model.config.get_text_config()
        words = torch.arange(min(embedding.shape[0], model.get_output_embeddings().weight.shape[0]))
        special = [v for k, v in vars(model.config).items() if k.endswith("token_id") and isinstance(v, int)]
        words = words[~torch.isin(words, torch.tensor(special, dtype=torch.long))]  # image placeholders and their like
        # Past a small window, where there is one: what lies beyond must not be seen.
        near = [getattr(config, n, None) for n in ("sliding_window", "attention_chunk_size")]
        length = 9 + max([w for w in near if isinstance(w, int) and w <= 64], default=0)
        length = min(length, getattr(config, "max_position_embeddings", None) or length)
        generator = torch.Generator().manual_seed(0)
        lengths = (min(7, length), length) * 2
        draw = [words[torch.randint(len(words), (n,), generator=generator)].to(embedding.device) for n in lengths]
        with evaluating(model):
            logits = torch.cat([model(ids[None], use_cache=False).logits[0] for ids in draw[:2]])
        return cls((draw[0], draw[1]), (draw[2], draw[3]), logits)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; afterwards every module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def check_parity(packed: PackedModel, reference: Reference | None = None) -> None:
    """Hold the model against transformers' own logits (`reference`; None: as its attention gives them now).

    A pack that mixes documents, or does not run, falls back to one sequence at a time, with a note and a warning.
    Raises UnsupportedModelError if hidden states and head do not give the model's own logits even then.
    """
    reference = Reference.of(packed.model) if reference is None else reference
    with evaluating(packed):
        check_transform(packed, reference.documents[0][:2])
        trouble = _trouble(packed, reference)
        if trouble and packed.packed:
            packed.use_plain_attention(f"packed sequences mix or fail ({trouble})")
            trouble = _trouble(packed, reference)
    if trouble:
        raise UnsupportedModelError(f"{packed.name} cannot be trained here: {trouble}")
    check_sharing(packed, reference.documents[1], reference.others[1])


def check_sharing(packed: PackedModel, document: Tensor, other: Tensor) -> None:
    """Hold a document [L] that shares its first half against the same by itself; its sibling has the rest of `other`.

    Where they differ, or it does not run, prompts are not shared, with a note and a warning.
    """
    if not packed.shares or document.shape[0] < 2:
        return
    with evaluating(packed):
        trouble = _trouble(packed, (document, other), _sharing_difference)
    if trouble:
        packed.use_own_prompts(f"shared prompts change or fail ({trouble})")


def _trouble(packed: PackedModel, given, difference: Callable | None = None) -> str | None:
    """What is wrong, in words, or None. Anything that this short run raises counts as wrong."""
    try:
        return (difference or _difference)(packed, given)
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
    left, right = hidden(first, other_second)[:length], hidden(other_first, second)[length:]
    leak = row_error(torch.cat([left, right]), h)
    if not leak.max() <= (APART[dtype] if _groups_tokens(packed.model) else 0.0):
        return f"changing one packed document changes hidden states of the other by {leak.max():.1e} (relative)"
    plain = row_error(packed.model(first[None], use_cache=False).logits[0], reference.logits[:length]).median()
    if packed.packed and not plain <= limit:
        return f"plain calls give logits {plain:.1e} (relative) from those before packing"
    return None


def _sharing_difference(packed: PackedModel, given: tuple[Tensor, Tensor]) -> str | None:
    document, other = given
    n, half, dtype = document.shape[0], document.shape[0] // 2, packed.head.weight.dtype
    layout = Layout((0, half, n, 2 * n - half), (-1, 0, 0))

    def hidden(sibling: Tensor) -> Tensor:
        made = packed.hidden(torch.cat([document[:half], sibling, document[half:]]), layout)
        return torch.cat([made[:half], made[n:]])

    h, want = hidden(other[half:]), packed.hidden(document, torch.tensor([0, n], dtype=torch.int32))
    limit = AGREES[dtype] if document.device.type == "cpu" else max(AGREES[dtype], ON_DEVICE.get(dtype, 0.0))
    error = row_error(h, want)
    worst = error.max() if dtype in (torch.float32, torch.float64) else error.median()
    if not worst <= limit:
        return f"hidden states after a shared prompt are {worst:.1e} (relative) from its own, allowed {limit:.0e}"
    leak = row_error(hidden(other[half:].flip(0)), h).max()
    if not leak <= (APART[dtype] if _groups_tokens(packed.model) else 0.0):
        return f"changing one completion changes hidden states of another by {leak:.1e} (relative)"
    return None


def _groups_tokens(model: nn.Module) -> bool:
    """True for attention models with experts: their GEMMs change shape with the company a token keeps.

    With layers that carry a state (they come with a short convolution, or say so in their kind) a small difference
    could be that state leaking, so those get no allowance.
    """
    config = model.config.get_text_config()
    experts = any("expert" in k and isinstance(x, int) and x > 1 for k, x in vars(config).items())
    stateful = any(isinstance(m, nn.Conv1d) for m in model.modules())
    return experts and not stateful and not any("linear" in str(k) for k in getattr(config, "layer_types", None) or ())


def row_error(got: Tensor, want: Tensor) -> Tensor:
    """[N] norm of each row's error over the norm of the row."""
    if got.shape != want.shape:
        raise UnsupportedModelError(f"logits are {list(got.shape)} from hidden states and head, but {list(want.shape)}")
    wide = torch.promote_types(want.dtype, torch.float32)
    got, want = got.to(wide), want.to(wide)
    return (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=torch.finfo(wide).tiny)


def check_transform(packed: PackedModel, input_ids: Tensor) -> None:
    """Put a ramp from -100 to 100 in place of the raw logits and see what the model makes of it.

    Random weights give logits too small for a cap to show; a ramp does not. Raises UnsupportedModelError.
    """
    head, device = packed.head, packed.head.weight.device
    dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
    ramp = torch.linspace(-100, 100, head.out_features, dtype=dtype, device=device).to(head.weight.dtype)
    hook = head.register_forward_hook(lambda module, inputs, output: ramp.expand_as(output))
    made = packed.model(input_ids[None], use_cache=False).logits
    hook.remove()
    want = head.transform.after(ramp.to(dtype)).expand(input_ids.shape[0], -1)
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

    def check() -> None:
        reference = Reference.of(model)
        packed.use_packed_attention()
        check_parity(packed, reference)

    believed(packed, check)
    return packed
