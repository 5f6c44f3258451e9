"""Changing one packed document leaves every other document's log-probs and gradients bitwise as they were."""

from __future__ import annotations

import pytest
import torch
import zoo
from transformers import AttentionInterface

from fastrl import TokenBatch, losses
from fastrl.models import pack_model
from fastrl.models.attention import NAMES, packed_attention
from fastrl.models.packed import next_tokens

LENGTHS = (11, 23, 5, 23, 1, 14)  # equal ones, one of a single token, some longer than the window of 8
CHANGED = 1


def packs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    before = zoo.documents(LENGTHS)
    after = list(before)
    after[CHANGED] = zoo.documents(LENGTHS, seed=1)[CHANGED]
    assert not torch.equal(before[CHANGED], after[CHANGED])
    return before, after


def rows_of_others() -> torch.Tensor:
    """[T] True outside of the changed document."""
    keep = [torch.full((n,), i != CHANGED) for i, n in enumerate(LENGTHS)]
    return torch.cat(keep)


def run(model, parts: list[torch.Tensor], mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Log-probs [T], gradients of the embedded input [T, H], and of every weight, for a loss over `mask`."""
    ids, cu_seqlens = torch.cat(parts), zoo.boundaries(parts)
    embedded = []

    def keep(module, inputs, output):
        output.retain_grad()
        embedded.append(output)

    hook = model.model.get_input_embeddings().register_forward_hook(keep)
    model.zero_grad()
    targets = next_tokens(ids, cu_seqlens)
    trained = targets != -100 if mask is None else (targets != -100) & mask
    batch = TokenBatch(targets=targets, mask=trained, cu_seqlens=cu_seqlens, num_tokens=int((targets != -100).sum()))
    out = model.loss(losses.get("nll"), ids, cu_seqlens, batch)
    out.loss.backward()
    hook.remove()  # one sequence at a time, the embedding is called once for each
    weights = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        logprobs = model.logprobs(ids, cu_seqlens).logprobs
    return {"logprobs": logprobs, "inputs": torch.cat([x.grad[0] for x in embedded if x.grad is not None]), **weights}


def differences(model) -> dict[str, bool]:
    """What of the other documents changed with the one."""
    before, after = packs()
    others = rows_of_others()
    a, b = (run(model, parts, None) for parts in (before, after))
    changed = {name: not torch.equal(a[name][others], b[name][others]) for name in ("logprobs", "inputs")}
    assert not torch.equal(a["logprobs"][~others], b["logprobs"][~others])  # the document did change
    a, b = (run(model, parts, others) for parts in (before, after))
    weights = [name for name in a if name not in ("logprobs", "inputs")]
    assert weights and all(a[name].abs().sum() > 0 for name in weights if "proj" in name or "attn" in name)
    changed["weights"] = any(not torch.equal(a[name], b[name]) for name in weights)
    changed["inputs of the untrained"] = bool(a["inputs"][~others].any() or b["inputs"][~others].any())
    return changed


@pytest.mark.parametrize("name", [*zoo.DENSE, "llama4", "minicpm3"])
def test_other_documents_are_bitwise_the_same(name):
    model = pack_model(zoo.make(name))
    assert model.packed
    assert not any(differences(model).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_precisions(dtype):
    assert not any(differences(pack_model(zoo.make("qwen3", dtype))).values())


def test_with_gradient_checkpointing():
    model = pack_model(zoo.make("mistral"))
    model.gradient_checkpointing_enable()
    assert not any(differences(model.train()).values())


@pytest.mark.parametrize("name", ["mamba", "lfm2"])
def test_one_sequence_at_a_time_isolates_too(name):
    with pytest.warns(UserWarning, match="one sequence at a time"):
        model = pack_model(zoo.make(name))
    assert not model.packed
    assert not any(differences(model).values())


def leaky(module, query, key, value, attention_mask, packing=None, **options):
    """Plain causal attention over the whole pack: what a trainer without boundaries does."""
    if packing is None:
        return packed_attention(module, query, key, value, attention_mask, **options)
    whole = type(packing).from_bounds((0, packing.bounds[-1]), query.device)
    return packed_attention(module, query, key, value, attention_mask, packing=whole, **options)


def test_a_leak_is_seen():
    """The test above can fail: without boundaries every part of it does."""
    model = pack_model(zoo.make("llama"))
    AttentionInterface.register(NAMES["sdpa"], leaky)
    changed = differences(model)
    AttentionInterface.register(NAMES["sdpa"], packed_attention)
    assert all(changed.values()), changed
