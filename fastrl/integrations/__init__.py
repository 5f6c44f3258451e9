"""Drop-ins for trainers that people already have.

`transformers.patch(model)`: a causal LM whose loss never forms logits. `trl.patch(trainer)`: TRL's trainers with the
fused head. For an integration of your own: `head_of(model)` is the model's head as the fused operators see it, adapters
included, and `deferring(model)` lets the model's own forward hand over hidden states in place of logits.
"""

import importlib

_HOMES = {
    "DeferredLogits": "fastrl.integrations.deferred",
    "Head": "fastrl.integrations.heads",
    "causal_lm_of": "fastrl.integrations.heads",
    "deferring": "fastrl.integrations.deferred",
    "head_of": "fastrl.integrations.heads",
}
_ROOMS = ("transformers", "trl")
__all__ = [*_HOMES]


def __getattr__(name: str):
    """Found on first use: neither transformers nor TRL is imported before it is asked for."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _ROOMS:
        value = importlib.import_module(f"fastrl.integrations.{name}")
    else:
        raise AttributeError(f"module 'fastrl.integrations' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted([*__all__, *_ROOMS])
