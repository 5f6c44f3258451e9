"""A tiny model, tokenizer and datasets, made from nothing in a second."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch

ALPHABET = "0123456789+= ?abc"


def make_model(path: Path, seed: int = 0, **overrides) -> Path:
    """A two-layer Qwen3-style causal LM and a character tokenizer, saved under `path`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocab = {c: i for i, c in enumerate(["<pad>", "<eos>", *ALPHABET])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    sizes = {
        "vocab_size": len(vocab),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    Qwen3ForCausalLM(Qwen3Config(**{**sizes, **overrides})).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def sums(count: int, seed: int) -> list[dict]:
    """Rows with every column the stages read, of ragged lengths."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        a, b = draw.randint(0, 9), draw.choice([draw.randint(0, 9), draw.randint(10, 99)])
        right = str(a + b)
        answers = {"completion": right, "answer": right, "chosen": right, "rejected": f"{a}{b} ?"}
        rows.append({"prompt": f"{a}+{b}=", **answers})
    return rows


def write(path: Path, rows: list[dict], columns: tuple[str, ...]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({c: row[c] for c in columns}) + "\n" for row in rows))
    return path


def make_data(root: Path) -> dict[str, Path]:
    """Directories of JSONL by stage, each with a train and a test split."""
    columns = {
        "sft": ("prompt", "completion"),
        "dpo": ("prompt", "chosen", "rejected"),
        "grpo": ("prompt", "answer"),
    }
    for stage, names in columns.items():
        write(root / stage / "train.jsonl", sums(40, 1), names)
        write(root / stage / "test.jsonl", sums(10, 2), names)
    return {stage: root / stage for stage in columns}
