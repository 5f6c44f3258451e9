"""The quickstart's model: a small Qwen3-style network and a character tokenizer, made from nothing but this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CHARACTERS = "0123456789+="
SPECIAL = ("<pad>", "<eos>", "<unk>")


def build_tokenizer() -> Any:
    """A `PreTrainedTokenizerFast` with one token for each of CHARACTERS, and eos, pad and unk."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def build_config(tokenizer: Any) -> Any:
    """A two-layer `Qwen3Config` of about 0.1 million parameters."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_model(directory: str | Path, seed: int = 0) -> Path:
    """Write a freshly initialised model and its tokenizer to `directory`; both load with `from_pretrained`.

    Draws from `seed`; the caller's random state is left as it was.
    """
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(build_config(tokenizer), dtype=torch.float32)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
