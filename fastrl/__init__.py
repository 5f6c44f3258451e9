"""fastrl: log-probs, entropy, KL and policy losses straight from hidden states; logits never formed."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "TokenBatch": "fastrl.tokens",
    "TokenStats": "fastrl.tokens",
    "HeadStats": "fastrl.tokens",
    "LossOutput": "fastrl.objective",
    "Divergence": "fastrl.objective",
    "Teacher": "fastrl.ops.distill",
    "fused_loss": "fastrl.ops",
    "linear_cross_entropy": "fastrl.ops",
    "linear_divergence": "fastrl.ops",
    "linear_logprobs": "fastrl.ops",
    "loss_from_logprobs": "fastrl.ops",
    "loss_from_scores": "fastrl.ops.scores",
}
_ROOMS = ("data", "integrations", "losses", "models", "ops", "rewards", "rollout", "tokens", "train")
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    """Public names are found on first use, so that `import fastrl` loads nothing heavy."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"fastrl.{name}")
    else:
        raise AttributeError(f"module 'fastrl' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted([*__all__, *_ROOMS])
