"""Curves of real models: traced without data, or, where an architecture reads its data, on small random weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl.train.config import TrainConfig
from fastrl.train.plan.curves import LAYERS, Curve, fitted
from fastrl.train.plan.skeleton import Part, build, depth, dressed, period, quiet, shrunken, without_data
from fastrl.train.plan.trace import How, Trace, trace

TOKENS = (768, 1536, 2304)
REAL_TOKENS = (64, 128, 192)
REAL_WORDS, REAL_EXPERTS = 1009, 8


def curve_of(parts: list[Part], architectures: list[Any], config: TrainConfig, how: How) -> Curve:
    """Bytes of these parts' update (or scoring) as a function of the tokens of a micro-batch."""
    try:
        return _curve(parts, architectures, config, how, real=False)
    except Exception as error:  # an architecture whose code asks for the values of its tensors
        curve = _curve(parts, architectures, config, how, real=True)
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        curve.notes.append(
            f"activations were measured on small random weights, not traced ({reason}); take them as a rough estimate"
        )
        return curve


def _curve(parts: list[Part], architectures: list[Any], config: TrainConfig, how: How, real: bool) -> Curve:
    repeat = max(period(a) for a in architectures)
    layers = min(depth(a) for a in architectures)
    counts = [n * repeat for n in LAYERS] if layers > LAYERS[1] * repeat else [layers]
    tracer = Tracer(parts, architectures, config, dataclasses.replace(how, block=repeat), real)
    lengths = REAL_TOKENS if real else _tokens(architectures)
    traces = tracer.run(counts[0], lengths)
    if real or fitted(traces, 1).quadratic:
        for count in counts[1:]:
            traces |= tracer.run(count, lengths)
    else:  # a line: the third number of tokens has shown it
        traces.pop((counts[0] // repeat, lengths[-1]))
        for count in counts[1:]:
            traces |= tracer.run(count, lengths[:-1])
    curve = fitted(traces, layers / repeat)
    curve.squares = sum(part * part for part in how.lengths)
    if real and how.backward:
        _with_all_words(curve, architectures, config)
    if not curve.exact and not real:
        curve.notes.append("what lives does not follow one pattern at every length; activations are a rough estimate")
    return curve


@dataclass(frozen=True)
class Tracer:
    """Traces of these parts with so many layers. real: on small random weights, else without data."""

    parts: list[Part]
    architectures: list[Any]
    config: TrainConfig
    how: How
    real: bool

    def run(self, layers: int, lengths: Sequence[int]) -> dict[tuple[int, int], Trace]:
        extra = {"words": REAL_WORDS, "experts": REAL_EXPERTS} if self.real else {}
        shapes = [shrunken(a, layers, **extra) for a in self.architectures]
        both = list(zip(self.parts, shapes, strict=True))
        where = contextlib.nullcontext() if self.real else torch.device("meta")
        with quiet(), where:
            models = [dressed(build(p, a, self.config), p, self.config) for p, a in both]
        mode = contextlib.nullcontext() if self.real else FakeTensorMode(allow_non_fake_inputs=True)
        with quiet(), mode:
            models = models if self.real else [without_data(m) for m in models]
            depths = [layers] * len(models)
            return {(layers // self.how.block, n): trace(models, depths, n, self.how) for n in lengths}


def _tokens(architectures: list[Any]) -> tuple[int, ...]:
    """Past a window, where there is one: from there on attention goes another way."""
    windows = [getattr(a.get_text_config(), "sliding_window", None) or 0 for a in architectures]
    longest = max((w for w in windows if isinstance(w, int)), default=0)
    return tuple(t + 2 * longest for t in TOKENS)


def _with_all_words(curve: Curve, architectures: list[Any], config: TrainConfig) -> None:
    """Gradients of embedding and head at their full size, from where the head has run."""
    size = 2 if config.dtype == "bfloat16" else 4
    missing = 0
    for arch in (a.get_text_config() for a in architectures):
        copies = 1 if arch.tie_word_embeddings else 2
        missing += copies * max(0, arch.vocab_size - REAL_WORDS) * arch.hidden_size * size
    first = int(np.argmax(curve.head)) if curve.head.any() else len(curve.head)
    curve.gradients[first:, 0] += missing


def kv_bytes(part: Part, arch: Any, config: TrainConfig, autocast: torch.dtype | None) -> tuple[float, float]:
    """(bytes of a sequence whatever its length, bytes of each token) of the cache that generation keeps."""
    small, layers = min(2 * period(arch), depth(arch)), depth(arch)
    try:
        with quiet(), torch.device("meta"):
            packed = build(part, shrunken(arch, small), config).eval()
        with quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            without_data(packed)
            a, b = (_cached(packed.model, tokens, autocast) for tokens in (16, 32))
    except Exception:  # a cache of another kind: keys and values of every layer
        text = arch.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return 0.0, 2.0 * layers * heads * width * (2 if autocast or config.dtype == "bfloat16" else 4)
    each = (b - a) / 16 * layers / small
    return max(0.0, (a - (b - a)) * layers / small), each


def _cached(model: torch.nn.Module, tokens: int, autocast: torch.dtype | None) -> float:
    from torch.utils._pytree import tree_leaves

    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        cache = model(torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
    tensors = [x for layer in cache.layers for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor)]
    return float(sum({id(x): x.nbytes for x in tensors if x.dim() > 2}.values()))
