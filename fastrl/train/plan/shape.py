"""How many tokens a micro-batch holds and in which sequences, as far as the flags tell without the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastrl.train.config import TrainConfig

PAIRS = ("dpo", "reward")
UNKNOWN_PROMPT = 512  # tokens, where no flag bounds a prompt


@dataclass(frozen=True)
class Shape:
    """tokens: of the fullest micro-batch. longest: of a sequence in it. step_tokens: of an optimizer step.

    trained: part of the tokens that the head sees. prompt, new_tokens, sampled: of one batch of completions.
    family: tokens of a shared prompt and of each answer to it; empty where nothing is shared.
    """

    tokens: int
    longest: int
    step_tokens: int
    trained: float = 1.0
    prompt: int = 0
    new_tokens: int = 0
    sampled: int = 0
    family: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def layout(self, kind: str) -> tuple[float, ...]:
        """Sequences as parts of the tokens. On a GPU attention reads boundaries and their number costs nothing; the
        CPU's goes through sequences of one length together and puts the parts side by side."""
        if self.family:
            return tuple(n / sum(self.family) for n in self.family)
        return (0.625, 0.375) if kind == "cpu" and self.longest < self.tokens else (1.0,)

    def parents(self, kind: str) -> tuple[int, ...] | None:
        return (-1, *[0] * (len(self.family) - 1)) if self.family else None


def shape_of(config: TrainConfig, arch: Any) -> Shape:
    """From the flags. What they do not bound is assumed, and said in the notes."""
    text = arch.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 30
    online = hasattr(config, "max_completion_length")
    new = getattr(config, "max_completion_length", None) or getattr(config, "max_new_tokens", 0)
    notes: list[str] = []
    prompt = 0
    if online:
        prompt = getattr(config, "max_prompt_length", None)
        if prompt is None:
            prompt = max(1, min(UNKNOWN_PROMPT, context - new))
            notes.append(f"no --max_prompt_length: prompts of at most {prompt} tokens are assumed")
        longest = prompt + new
    else:
        longest = getattr(config, "max_length", None) or context
        prompt = max(1, longest - new) if new else 0
    longest = min(longest, context)
    sequences = config.batch_size * (2 if config.stage in PAIRS else 1)
    step = sequences * longest
    tokens = min(step, max(config.max_tokens_per_device, longest))
    family = _family(config, longest, prompt, new, online)
    if family and len(family) > 2:  # what the answers share is there once
        apart = (len(family) - 1) * (family[0] + family[1])
        step = step * sum(family) // apart
        tokens = min(tokens, max(step, longest))
    trained = new / longest if online else 1.0
    if family:
        trained = sum(family[1:]) / sum(family)
    sampled = getattr(config, "completions_per_generation", 0) if online else (config.batch_size if new else 0)
    return Shape(tokens, longest, step, trained, prompt, new, sampled, family, tuple(notes))


def _family(config: TrainConfig, longest: int, prompt: int, new: int, online: bool) -> tuple[int, ...]:
    """A prompt and the answers that share it."""
    if not config.share_prompts:
        return ()
    if online:
        return (prompt, *[new] * getattr(config, "num_generations", 1))
    return (longest // 2, longest // 2, longest // 2) if config.stage in PAIRS else ()
