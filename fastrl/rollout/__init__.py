"""Sampling completions: `Sampler` is the protocol, `TransformersSampler` the one that is always there."""

from fastrl.rollout.protocol import Completion, Sampler, Sampling
from fastrl.rollout.transformers import TransformersSampler

__all__ = ["Completion", "Sampler", "Sampling", "TransformersSampler"]
