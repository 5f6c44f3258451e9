"""Any transformers causal LM, packed, with its head as a fused module."""

from fastrl.models.attention import Packing
from fastrl.models.head import LMHead, LogitTransform
from fastrl.models.load import load_causal_lm, load_reference, load_tokenizer, save_pretrained
from fastrl.models.packed import PackedModel, UnsupportedModelError, check_parity

__all__ = [
    "LMHead",
    "LogitTransform",
    "PackedModel",
    "Packing",
    "UnsupportedModelError",
    "check_parity",
    "load_causal_lm",
    "load_reference",
    "load_tokenizer",
    "save_pretrained",
]
