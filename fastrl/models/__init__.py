"""Any transformers causal LM, packed, with its head as a fused module."""

from fastrl.models.attention import UnsupportedModelError
from fastrl.models.check import check_parity, pack_model
from fastrl.models.head import LMHead, LogitTransform
from fastrl.models.load import load_causal_lm, load_reference, load_tokenizer
from fastrl.models.packed import PackedModel, next_tokens
from fastrl.models.packing import Packing
from fastrl.models.save import save_pretrained

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
    "next_tokens",
    "pack_model",
    "save_pretrained",
]
