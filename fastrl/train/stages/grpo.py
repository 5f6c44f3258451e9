"""GRPO and kin: prompts of the dataset x completions of the policy x advantages relative to the prompt's group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fastrl import losses
from fastrl.advantages import group_normalised
from fastrl.data import Rows, encode_prompts
from fastrl.data.sampler import IndexSampler
from fastrl.data.types import DataError, Prompt, Sample
from fastrl.rewards import load_rewards
from fastrl.rollout import Completion, Sampler, Sampling, TransformersSampler
from fastrl.train.config import GRPOConfig
from fastrl.train.judges import opener
from fastrl.train.metrics import MetricsLogger
from fastrl.train.stages.base import Setting, give_logprobs, noted
from fastrl.train.stages.grpo_metrics import completion_metrics, reward_metrics
from fastrl.train.step import Forward, MicroBatch, plan


def objective_of(config: GRPOConfig):
    """The objective that --loss_type names, with the flags as its numbers."""
    numbers = {"kl_coef": config.beta, "kl": config.kl_estimator, "entropy_coef": config.entropy_coef}
    if config.loss_type != "reinforce":
        numbers |= {"clip_low": config.clip_low, "clip_high": config.clip_high, "dual_clip": config.delta}
    if config.loss_type == "dr_grpo":
        numbers["max_length"] = config.max_completion_length
    return losses.get(config.loss_type, **numbers)


class GRPOStage:
    """Sample, score, normalise in the group; then as many optimizer steps as the sampled batch holds."""

    def __init__(self, setting: Setting, prompts: list[Prompt], held_out: list[Prompt], sampler: Sampler, scorer):
        config: GRPOConfig = setting.config
        self.setting, self.config = setting, config
        self.prompts, self.held_out, self.sampler, self.scorer = prompts, held_out, sampler, scorer
        self.objective = objective_of(config)
        self.how = Forward(config.temperature, ("entropy",), setting.autocast, config.debug_checks)
        self.sampling = Sampling(config.max_completion_length, config.temperature)
        self.prompts_at_once = config.completions_per_generation // config.num_generations
        self.order = IndexSampler(len(prompts), config.seed)
        self.steps_per_epoch = self.order.batches_per_epoch(self.prompts_at_once) * config.updates_per_generation
        self.pending: list[list[Sample]] = []  # optimizer steps sampled and not yet trained

    def collect(self, log: MetricsLogger) -> list[MicroBatch]:
        if not self.pending:
            self.pending = self.roll_out(log)
        return plan(self.pending.pop(0), self.config.max_tokens_per_device, self.setting.device)

    def roll_out(self, log: MetricsLogger) -> list[list[Sample]]:
        """Prompts -> completions -> rewards -> advantages: the samples of each optimizer step until the next call."""
        prompts = [self.prompts[i] for i in self.order.take(self.prompts_at_once)]
        with log.timing("gen"):
            made = self.sampler.generate([p.ids for p in prompts], self.sampling, self.config.num_generations)
        samples, scores = self.score(prompts, made, log)
        log.add_mean(completion_metrics([c for group in made for c in group], self.config.max_completion_length))
        groups = torch.tensor([s.fields["group_id"] for s in samples])
        advantages, std = group_normalised(scores.total, groups, self.config.scale_rewards)
        log.add_mean(reward_metrics(scores, std, groups))
        for sample, advantage in zip(samples, advantages.tolist(), strict=True):
            sample.fields["advantage"] = advantage
        size = self.config.batch_size
        steps = [samples[i : i + size] for i in range(0, len(samples), size)]
        for step in steps:
            self.give_logprobs(step, log)
        return [step for _ in range(self.config.num_iterations) for step in steps]

    def give_logprobs(self, samples: list[Sample], log: MetricsLogger) -> None:
        """Old log-probs (a batch used for one update needs none: they are the current ones) and the reference's."""
        setting = self.setting
        models = {"ref_logprobs": setting.reference} if setting.reference is not None else {}
        if self.config.updates_per_generation > 1:
            models["old_logprobs"] = setting.model
        for name, model in models.items():
            give_logprobs(model, name, plan(samples, self.config.max_tokens_per_device, setting.device), self.how, log)

    def score(self, prompts: Sequence[Prompt], made: list[list[Completion]], log: MetricsLogger):
        """Token-exact samples of all completions, and their rewards."""
        samples = []
        for group_id, (prompt, completions) in enumerate(zip(prompts, made, strict=True)):
            for c in completions:
                sample = Sample.from_parts(prompt.ids, c.ids, group_id=group_id)
                if c.truncated and self.config.mask_truncated_completions:
                    sample = dataclasses.replace(sample, completion_mask=[False] * len(sample))
                samples.append(sample)
        owners = [p for p, group in zip(prompts, made, strict=True) for _ in group]
        with log.timing("reward"):
            return samples, self.scorer.score(owners, [c for group in made for c in group])

    @torch.no_grad()
    def evaluate(self, log: MetricsLogger) -> dict[str, float]:
        """Rewards of completions of the held-out prompts (--eval_temperature 0 is greedy); same draws every time."""
        if not self.held_out:
            return {}
        config = self.config
        temperature = config.temperature if config.eval_temperature is None else config.eval_temperature
        sampling, n = Sampling(config.max_completion_length, temperature), config.num_generations_eval
        with log.timing("eval"):
            made = self.sampler.generate([p.ids for p in self.held_out], sampling, n, seed=config.seed)
            samples, scores = self.score(self.held_out, made, log)
        groups = torch.tensor([s.fields["group_id"] for s in samples])
        _, std = group_normalised(scores.total, groups)
        flat = [c for group in made for c in group]
        values = reward_metrics(scores, std, groups) | completion_metrics(flat, config.max_completion_length)
        return {f"eval_{name}": float(value) for name, value in values.items()}

    def state_dict(self) -> dict:
        """Data order, and the samples that wait for their optimizer step."""
        return {
            "order": self.order.state_dict(),
            "pending": [[dataclasses.asdict(s) for s in step] for step in self.pending],
        }

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
        self.pending = [[Sample(**s) for s in step] for step in state["pending"]]


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> GRPOStage:
    config: GRPOConfig = setting.config
    context = setting.model.context_length
    room = None if context is None else context - config.max_completion_length
    if room is not None and room < 1:
        raise DataError(
            f"--max_completion_length {config.max_completion_length} leaves no room for a prompt in the model's "
            f"context of {context} tokens; lower it"
        )
    known = [n for n in (room, config.max_prompt_length) if n is not None]
    longest = min(known) if known else None

    def encode(rows: Rows | None, split: str) -> list:
        if rows is None:
            return []
        return noted(notes, split, encode_prompts(rows, setting.tokenizer, longest, config.max_dropped_fraction))

    sampler = TransformersSampler(setting.model.model, setting.tokenizer)
    scorer = load_rewards(config.reward_funcs, config.reward_weights, setting.tokenizer, opener(setting))
    return GRPOStage(setting, encode(train, "train"), encode(test, "test"), sampler, scorer)
