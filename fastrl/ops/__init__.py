"""The only door to the kernels."""

from fastrl.ops.fused import fused_loss, loss_from_logprobs
from fastrl.ops.linear import linear_cross_entropy, linear_logprobs

__all__ = ["fused_loss", "linear_cross_entropy", "linear_logprobs", "loss_from_logprobs"]
