"""Sampling with transformers' own `generate`: batched, left-padded, KV cache, no server.

`generate` adds about 0.3 ms a token to the model's own time (measured on a 0.6M-parameter model, one CPU thread), so
the cost that can be saved is padding: prompts are sorted by length and cut into batches under a token budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastrl.rollout.protocol import Completion, Sampling, seed_of

LOGITS_BYTES = 1 << 30  # of a batch's next-token logits and their fp32 copies while one token is drawn


class TransformersSampler:
    """Completes prompts with a transformers causal LM that lives in this process.

    Args:
        model: the model; it may be training: it is put into eval mode while it samples, and back.
        tokenizer: for eos and pad ids only; nothing is encoded or decoded.
        max_tokens: prompt and completion tokens (padding counted) that one batch may hold in its KV cache. Its rows are
            also kept to what LOGITS_BYTES of next-token logits allow.
        attn_implementation: attention to use while sampling, e.g. "sdpa" where training uses a packed one that knows
            no padding; None keeps the model's.
    """

    def __init__(self, model, tokenizer, *, max_tokens: int = 131072, attn_implementation: str | None = None):
        self.model, self.max_tokens, self.attn_implementation = model, max_tokens, attn_implementation
        self.eos_ids = eos_ids(model, tokenizer)
        pad = tokenizer.pad_token_id
        self.pad_id = self.eos_ids[0] if pad is None else pad

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        n: int | Sequence[int] = 1,
        seed: int | None = None,
        first: int = 0,
    ) -> list[list[Completion]]:
        """`n` completions (or n[i]) of each prompt, in the order of the prompts.

        Args:
            prompts: token ids of each prompt, not empty.
            sampling: temperature and limits; see `Sampling`.
            n: completions of each prompt.
            seed: of the draws. The caller's random state is left as it was. None takes one from the caller's state.
            first: the number of prompts[0] among the prompts of this seed. A completion's draws depend on the seed, on
                its prompt's number and on its own among that prompt's; not on what it is batched with.

        Returns: for each prompt its completions. A completion ends with the end-of-sequence token it drew, or is
        `truncated` after max_new_tokens. Raises ValueError for an empty prompt or one that leaves too little context,
        RuntimeError where the model's logits are not numbers.
        """
        counts = [n] * len(prompts) if isinstance(n, int) else list(n)
        self._check(prompts, counts, sampling)
        rows = [(i, k) for i, count in enumerate(counts) for k in range(count)]
        if seed is None and not sampling.greedy:
            seed = int(torch.randint(2**62, ()))
        results: list[list[Completion]] = [[] for _ in prompts]
        with self._sampling_mode():
            lengths = [len(prompts[i]) for i, _ in rows]
            for batch in _batches(lengths, sampling.max_new_tokens, self.max_tokens, self._max_rows):
                chosen = [rows[j] for j in batch]
                seeds = None if sampling.greedy else [seed_of(seed, first + i, k) for i, k in chosen]
                made = self._complete([prompts[i] for i, _ in chosen], sampling, seeds)
                for (i, _), completion in zip(chosen, made, strict=True):
                    results[i].append(completion)
        return results

    def _complete(self, prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int] | None) -> list[Completion]:
        """One batch: pad on the left, generate, cut each row after its first end-of-sequence token."""
        from fastrl.rollout.draws import processors
        from fastrl.rollout.record import Record

        width = max(len(p) for p in prompts)
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts])
        attended = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        device = self.model.device
        record = Record(sampling.temperature) if sampling.logprobs else None
        hooks = {} if record is None else record.hooks()
        if seeds is not None:
            hooks["logits_processor"] = processors(sampling, seeds, hooks.get("logits_processor"))
        output = self.model.generate(
            ids.to(device),
            attention_mask=attended.to(device),
            generation_config=self._generation_config(sampling.max_new_tokens),
            synced_gpus=False,  # ranks that sample each run as often as their own rows need
            **hooks,
        )
        if seeds is not None:
            hooks["logits_processor"][-1].check()
        made = [self._cut(row, sampling.max_new_tokens) for row in output[:, width:].tolist()]
        if record is not None:
            for completion, logprobs in zip(made, record.logprobs(), strict=True):
                completion.logprobs = logprobs[: len(completion.ids)]
        return made

    def _cut(self, ids: list[int], limit: int) -> Completion:
        """Up to and including the first end-of-sequence token. What follows it is padding, whatever its id."""
        end = next((t for t, token in enumerate(ids) if token in self.eos_ids), None)
        if end is not None:
            return Completion(ids[: end + 1], truncated=False)
        if len(ids) != limit:
            raise RuntimeError(
                f"generation stopped after {len(ids)} of {limit} tokens without an end-of-sequence token"
            )
        return Completion(ids, truncated=True)

    @property
    def _max_rows(self) -> int:
        """Rows whose logits fit: scores, the same by temperature, noise and their sum, 4 bytes each a vocabulary entry.

        Log-probs are taken of the same scores, with one more copy inside their normaliser; rows are not cut for it.
        """
        return max(1, LOGITS_BYTES // (16 * self.model.config.get_text_config().vocab_size))

    def _generation_config(self, max_new_tokens: int):
        """The likeliest token of each step, which noise makes a draw. Penalties and filters that a model ships with
        would bias the log-probs."""
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            bos_token_id=None,
            use_cache=True,
            do_sample=False,
        )

    @contextmanager
    def _sampling_mode(self) -> Iterator[None]:
        """Eval mode, a neutral generation config, the attention for padded batches; then everything as before."""
        from transformers import GenerationConfig

        model = self.model
        training, shipped = [m for m in model.modules() if m.training], model.generation_config
        attention = model.config._attn_implementation
        swap = self.attn_implementation not in (None, attention)
        model.eval()
        model.generation_config = GenerationConfig(eos_token_id=self.eos_ids, pad_token_id=self.pad_id)
        if swap:
            model.set_attn_implementation(self.attn_implementation)
        try:
            yield
        finally:
            for module in training:
                module.training = True
            model.generation_config = shipped
            if swap:
                model.set_attn_implementation(attention)

    def _check(self, prompts: Sequence[Sequence[int]], counts: list[int], sampling: Sampling) -> None:
        if len(counts) != len(prompts):
            raise ValueError(f"n has {len(counts)} counts for {len(prompts)} prompts; give one number, or one for each")
        context = context_length(self.model)
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} is empty; a model needs at least one token to go on from")
            if context is not None and len(prompt) + sampling.max_new_tokens > context:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={sampling.max_new_tokens} that is more "
                    f"than the model's context of {context}; drop it or lower max_new_tokens"
                )


def eos_ids(model, tokenizer) -> list[int]:
    """Every id that ends a completion: the tokenizer's and those the model's generation config names (as TRL)."""
    shipped = model.generation_config.eos_token_id if model.generation_config is not None else None
    shipped = [] if shipped is None else [shipped] if isinstance(shipped, int) else list(shipped)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = list(dict.fromkeys([*own, *shipped]))
    if not ids:
        raise ValueError("neither the tokenizer nor the model's generation config has an eos token; set one")
    return ids


def context_length(model) -> int | None:
    """Tokens the model has positions for, or None if its config does not say."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)


def _batches(lengths: list[int], new_tokens: int, budget: int, max_rows: int) -> list[list[int]]:
    """Rows sorted by length (long first, stable), cut so that rows x (longest + new) stays within the budget."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    out: list[list[int]] = []
    for i in order:
        count = len(out[-1]) + 1 if out else 0
        if 0 < count <= max_rows and count * (lengths[out[-1][0]] + new_tokens) <= budget:
            out[-1].append(i)
        else:
            out.append([i])
    return out
