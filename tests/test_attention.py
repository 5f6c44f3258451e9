"""Exact attention of packed sequences against the definition, in float64, with gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastrl.models import Packing, UnsupportedModelError, exact
from fastrl.models.attention import NAME, _visible, packed_attention
from fastrl.models.exact import Scores, attend_packed

LENGTHS = (7, 12, 1, 7, 30)
HEADS, KV_HEADS, D, E = 4, 2, 8, 6


def inputs(kv_heads: int = KV_HEADS):
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)

    def draw(heads: int, size: int) -> torch.Tensor:
        # As layers make them: [1, T, heads, d] seen as [1, heads, T, d].
        x = torch.randn(1, total, heads, size, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2).requires_grad_()

    return draw(HEADS, D), draw(kv_heads, D), draw(kv_heads, E)


def definition(q, k, v, scores: Scores, chunk: int | None = None) -> torch.Tensor:
    """One [T, T] softmax with everything that must not be seen masked out."""
    k, v = (x.repeat_interleave(HEADS // x.shape[1], dim=1) for x in (k, v))
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    at = torch.cat([torch.arange(n) for n in LENGTHS])
    back = at[:, None] - at[None, :]
    seen = (document[:, None] == document[None, :]) & (back >= 0)
    if scores.window is not None:
        seen &= back < scores.window
    if chunk is not None:
        seen &= at[:, None] // chunk == at[None, :] // chunk
    z = q @ k.transpose(-1, -2) * (D**-0.5 if scores.scaling is None else scores.scaling)
    if scores.softcap is not None:
        z = scores.softcap * torch.tanh(z / scores.softcap)
    z = z.masked_fill(~seen, -torch.inf).exp()
    total = z.sum(-1, keepdim=True)
    if scores.sinks is not None:
        total = total + scores.sinks.view(1, -1, 1, 1).exp()
    return (z / total @ v).transpose(1, 2)


def agree(made: torch.Tensor, want: torch.Tensor, leaves) -> None:
    torch.testing.assert_close(made, want, atol=1e-12, rtol=1e-12)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    got = torch.autograd.grad(made, leaves, upstream)
    expected = torch.autograd.grad(want, leaves, upstream)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.fixture
def packing() -> Packing:
    return Packing.of(torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32))


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_against_the_definition(packing, monkeypatch, kv_heads, window, softcap, sinks, block):
    monkeypatch.setattr(exact, "BLOCK", block)
    q, k, v = inputs(kv_heads)
    logits = torch.linspace(-1, 1, HEADS, dtype=torch.float64).requires_grad_() if sinks else None
    scores = Scores(0.4, window, softcap, logits)
    leaves = [q, k, v] + ([logits] if sinks else [])
    agree(attend_packed(q, k, v, packing, scores), definition(q, k, v, scores), leaves)


def test_chunked_attention_is_packing_of_chunks(packing):
    q, k, v = inputs()
    cut = packing.chunked(5)
    assert cut.max_seqlen == 5 and packing.chunked(5) is cut and packing.chunked(30) is packing
    agree(attend_packed(q, k, v, cut, Scores()), definition(q, k, v, Scores(), chunk=5), [q, k, v])


def test_packing_drops_empty_sequences_and_restarts_positions():
    packing = Packing.of(torch.tensor([0, 0, 3, 3, 5, 8, 8], dtype=torch.int64))
    assert packing.bounds == (0, 3, 5, 8) and packing.cu_seqlens.dtype == torch.int32
    assert packing.position_ids.tolist() == [0, 1, 2, 0, 1, 0, 1, 2] and packing.max_seqlen == 3
    assert packing.groups == ((2, 3), (1, 2)) and packing.order.tolist() == [0, 1, 2, 5, 6, 7, 3, 4]
    assert packing.order[packing.back].tolist() == list(range(8))


class Layer(torch.nn.Module):
    """What packed attention reads of a layer."""

    def __init__(self, kind: str | None, layer_idx: int = 1):
        super().__init__()
        self.layer_idx, self.is_causal = layer_idx, True
        kinds = None if kind is None else ["full_attention", kind]
        sizes = {"sliding_window": 4, "attention_chunk_size": 5, "_attn_implementation": NAME}
        self.config = type("Config", (), {"layer_types": kinds, **sizes})()


@pytest.mark.parametrize(
    ("kind", "passed", "window"),
    [("sliding_attention", None, 4), ("sliding_attention", 7, 7), ("full_attention", 7, None), (None, 7, 7)],
)
def test_windows_follow_the_kind_of_the_layer(packing, kind, passed, window):
    assert _visible(Layer(kind), packing, passed) == (packing, window)


def test_chunks_follow_the_kind_of_the_layer(packing):
    assert _visible(Layer("chunked_attention"), packing, None) == (packing.chunked(5), None)


@pytest.mark.parametrize(
    "unknown", [{"position_bias": torch.zeros(1)}, {"indices": torch.zeros(1)}, {"is_causal": False}]
)
def test_what_is_not_known_is_refused_by_name(packing, unknown):
    q, k, v = inputs()
    with pytest.raises(UnsupportedModelError, match="Layer .*(position_bias|indices|not causal)"):
        packed_attention(Layer(None), q, k, v, None, packing=packing, position_ids=None, **unknown)


def test_cross_attention_is_refused(packing):
    q, k, v = inputs()
    with pytest.raises(UnsupportedModelError, match="needs .1, heads, T=57, d. on both sides"):
        packed_attention(Layer(None), q, k[:, :, :9], v[:, :, :9], None, packing=packing)


def test_a_nan_stays_in_its_document(packing):
    q, k, v = inputs()
    for scores in (Scores(), Scores(window=3), Scores(softcap=2.0)):
        poisoned = v.detach().clone()
        poisoned[:, :, 7:19] = torch.nan  # all of document 1
        made = attend_packed(q, k, poisoned, packing, scores)[0].isnan().flatten(1).any(1)
        assert made[7:19].all() and not made[:7].any() and not made[19:].any()
