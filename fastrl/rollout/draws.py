"""Draws that depend on which completion of which prompt is drawn, and on no batch, order or number of processes.

The token with the largest score + g, g Gumbel noise, is a draw from softmax(score). It changes with the rounding of the
scores only where two sums are that close, which a walk along the cumulative distribution does not promise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastrl.rollout.protocol import Sampling

BLOCK = 1 << 14  # numbers drawn at once for a row, if its steps need as many: a call of a generator costs microseconds
SMALLEST = 2.0**-32  # of the exponential draws; 0 would win whatever the score is


def processors(
    sampling: Sampling, seeds: Sequence[int], scale: LogitsProcessorList | None = None
) -> LogitsProcessorList:
    """What makes `generate`'s greedy choice a draw of each row from its own seed.

    scale: divides by the temperature; None: done here.
    """
    made = scale or LogitsProcessorList()
    if scale is None and sampling.temperature != 1:
        made.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k > 0:
        made.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        made.append(TopPLogitsWarper(sampling.top_p))
    made.append(Noise(seeds, sampling.max_new_tokens))
    return made


class Noise(LogitsProcessor):
    """Adds Gumbel noise to the scores of each row, from a stream of its own.

    seeds: [B]. The noise of a step is a function of (seed, V, max_new_tokens, step) on one kind of device.
    """

    def __init__(self, seeds: Sequence[int], max_new_tokens: int):
        self.seeds, self.max_new_tokens = list(seeds), max_new_tokens
        self.step = 0
        self.noise: Tensor | None = None  # [B, K, V] of K steps
        self.highest: Tensor | None = None  # sum of the largest scores: NaN once a score was

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        steps = max(1, min(self.max_new_tokens, BLOCK // scores.shape[1]))
        if self.step % steps == 0:
            self._fill(scores, steps)
        noise = self.noise[:, self.step % steps]
        self.step += 1
        top = scores.amax()
        self.highest = top if self.highest is None else self.highest + top
        return scores + noise

    def _fill(self, scores: Tensor, steps: int) -> None:
        shape = (len(self.seeds), steps, scores.shape[1])
        if self.noise is None:
            self.noise = torch.empty(shape, dtype=torch.float32, device=scores.device)
        generator, block = torch.Generator(device=scores.device), self.step // steps
        for row, seed in zip(self.noise, self.seeds, strict=True):
            row.exponential_(generator=generator.manual_seed((seed + block) % 2**63))
        self.noise.clamp_(min=SMALLEST).log_().neg_()  # -log of an exponential draw is a Gumbel draw

    def check(self) -> None:
        """Raises RuntimeError if a score was not a number."""
        if self.highest is not None and bool(self.highest.isnan()):
            raise RuntimeError("the model's logits are not numbers while it samples; its weights may have diverged")
