"""The only door to the kernels."""

from fastrl.ops.divergence import linear_divergence
from fastrl.ops.fused import fused_loss, loss_from_logprobs
from fastrl.ops.linear import linear_cross_entropy, linear_logprobs
from fastrl.ops.scan import gae
from fastrl.ops.segments import pair_logits, segment_mean, segment_sum

__all__ = [
    "fused_loss",
    "gae",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_logprobs",
    "loss_from_logprobs",
    "pair_logits",
    "segment_mean",
    "segment_sum",
]
