"""Any transformers causal LM, packed, with its head as a fused module."""

from fastrl.models.actor_critic import ActorCritic
from fastrl.models.attention import UnsupportedModelError
from fastrl.models.check import check_parity, pack_model
from fastrl.models.head import LMHead, LogitTransform
from fastrl.models.load import load_causal_lm, load_reference, load_tokenizer
from fastrl.models.packed import PackedModel, next_tokens
from fastrl.models.packing import Packing
from fastrl.models.save import save_pretrained
from fastrl.models.score import ScoreModel, load_reward_model, load_token_classifier

__all__ = [
    "ActorCritic",
    "LMHead",
    "LogitTransform",
    "PackedModel",
    "Packing",
    "ScoreModel",
    "UnsupportedModelError",
    "check_parity",
    "load_causal_lm",
    "load_reference",
    "load_reward_model",
    "load_token_classifier",
    "load_tokenizer",
    "next_tokens",
    "pack_model",
    "save_pretrained",
]
