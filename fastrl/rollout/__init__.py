"""Sampling completions: `Sampler` is the protocol, `TransformersSampler` the one that is always there."""

from fastrl.rollout.protocol import Completion, Sampler, Sampling, seed_of
from fastrl.rollout.transformers import TransformersSampler

__all__ = ["Completion", "Sampler", "Sampling", "TransformersSampler", "seed_of"]
