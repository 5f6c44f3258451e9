"""A reward model as a reward function: prompts and completions in, scores out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.data.packing import pack
from fastrl.models.load import load_tokenizer
from fastrl.models.score import ScoreModel, load_reward_model


class RewardModelFunction:
    """Scores answers as the reward model was trained to read them: prompt and answer together, then the end of text.

    Called as reward functions are; gives one float a completion, None where prompt and completion are longer than the
    model has positions for. The tokenizer is the reward model's own, so it may differ from the policy's.
    """

    def __init__(self, model: ScoreModel, tokenizer: Any, name: str, max_tokens: int = 8192, autocast=None):
        if model.head.out_features != 1:
            raise ValueError(f"{name} has a head of {model.head.out_features} outputs; a reward is one number")
        self.model = model.requires_grad_(False).eval()
        self.tokenizer, self.max_tokens, self.autocast = tokenizer, max_tokens, autocast
        self.__name__ = name

    @torch.no_grad()
    def __call__(self, prompts: list, completions: list, tools: list | None = None) -> list[float | None]:
        tools = [None] * len(prompts) if tools is None else tools
        ids = [self.encode(*each) for each in zip(prompts, completions, tools, strict=True)]
        limit = self.model.context_length
        fitting = [i for i, x in enumerate(ids) if x and (limit is None or len(x) <= limit)]
        out: list[float | None] = [None] * len(ids)
        for part in pack([len(ids[i]) for i in fitting], self.max_tokens):
            chosen = [fitting[j] for j in part]
            for i, score in zip(chosen, self._scores([ids[i] for i in chosen]), strict=True):
                out[i] = score
        return out

    def encode(self, prompt: Any, completion: Any, tools: Any = None) -> list[int]:
        """Token ids of a string with its answer, or of messages with theirs."""
        if isinstance(prompt, str):
            end = self.tokenizer.eos_token or ""
            text = prompt + completion
            return self.tokenizer(text=text if text.endswith(end) else text + end)["input_ids"]
        tools = json.loads(tools) if isinstance(tools, str) else tools
        made = self.tokenizer.apply_chat_template([*prompt, *completion], tools=tools, tokenize=True, return_dict=True)
        return list(made["input_ids"])

    def _scores(self, ids: Sequence[list[int]]) -> list[float]:
        device = self.model.head.weight.device
        flat = torch.tensor([t for x in ids for t in x], device=device)
        cu_seqlens = torch.tensor([0, *map(len, ids)]).cumsum(0).to(torch.int32)
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.model.scores(flat, cu_seqlens).tolist()


def load_reward_function(
    path: str | Path, device: torch.device | str = "cpu", *, max_tokens: int = 8192, autocast=None, **options: Any
) -> RewardModelFunction:
    """The sequence classifier in a directory, with its tokenizer, named after the directory.

    options: dtype, attn_implementation of load_reward_model. Raises: as load_reward_model.
    """
    tokenizer = load_tokenizer(path)
    model = load_reward_model(path, **options, tokenizer=tokenizer).to(device)
    return RewardModelFunction(model, tokenizer, Path(path).name, max_tokens, autocast)
