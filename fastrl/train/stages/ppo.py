"""PPO: prompts of the dataset x completions of the policy x advantages over what a critic expected, token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl import losses
from fastrl.advantages import gae, token_rewards, whitened
from fastrl.data import Rows, encode_prompts
from fastrl.data.sampler import IndexSampler
from fastrl.data.types import DataError, Prompt, Sample
from fastrl.models import load_causal_lm
from fastrl.models.actor_critic import CRITIC, ActorCritic
from fastrl.models.load import base_of
from fastrl.models.score import load_reward_model
from fastrl.rewards import Scores, load_rewards
from fastrl.rollout import Completion, Sampler, Sampling, TransformersSampler, seed_of
from fastrl.train.budget import in_parts
from fastrl.train.config import PPOConfig
from fastrl.train.exchange import SharedScorer, shared_sampler
from fastrl.train.judges import opener
from fastrl.train.metrics import MetricsLogger
from fastrl.train.stages.base import Setting, give_logprobs, noted
from fastrl.train.stages.grpo_metrics import completion_metrics, known_values
from fastrl.train.step import Forward, MicroBatch, attach, exchange


class PPOStage:
    """Sample, score, estimate advantages; then num_ppo_epochs passes of num_mini_batches optimizer steps."""

    def __init__(self, setting: Setting, prompts: list[Prompt], held_out: list[Prompt], sampler: Sampler, scorer):
        config: PPOConfig = setting.config
        self.setting, self.config = setting, config
        self.prompts, self.held_out, self.sampler, self.scorer = prompts, held_out, sampler, scorer
        clips = {"clip_low": config.cliprange, "clip_high": config.cliprange}
        self.objective = losses.get("ppo_clip", **clips, entropy_coef=config.entropy_coef)
        self.how = Forward(config.temperature, ("entropy",), setting.autocast, config.debug_checks)
        self.sampling = Sampling(config.max_completion_length, config.temperature)
        self.order = IndexSampler(len(prompts), config.seed)
        whole, rest = divmod(len(prompts), config.completions_per_generation)
        in_a_pass = whole * config.num_mini_batches - (-rest // config.batch_size)  # what is left fills fewer steps
        self.steps_per_epoch = in_a_pass * config.num_ppo_epochs
        self.pending: list[list[Sample]] = []  # optimizer steps sampled and not yet trained

    def collect(self, log: MetricsLogger) -> list[MicroBatch]:
        if not self.pending:
            self.pending = self.roll_out(log)
        return self.setting.plan(self.pending.pop(0))

    def roll_out(self, log: MetricsLogger) -> list[list[Sample]]:
        """Prompts -> completions -> rewards -> advantages and returns: the samples of each optimizer step to come."""
        seed = seed_of(self.config.seed, self.order.epoch, self.order.offset)  # of these draws, on every rank
        prompts = [self.prompts[i] for i in self.order.take(self.config.completions_per_generation)]
        with log.timing("gen"), self.how.context(self.setting.device):
            made = [group[0] for group in self.sampler.generate([p.ids for p in prompts], self.sampling, 1, seed)]
        scores, total = self.score(prompts, made, log)
        samples = [sample_of(p, c, r) for p, c, r in zip(prompts, made, total.tolist(), strict=True)]
        size = self.config.batch_size
        steps = [samples[i : i + size] for i in range(0, len(samples), size)]
        for step in steps:  # by the very micro-batches of the first pass, so that its first ratio is 1 in every bit
            self.give_statistics(step, log)
        self.give_advantages(samples, total, log)
        log.add_mean(completion_metrics(made, self.config.max_completion_length))
        log.add_mean(known_values(reward_means(scores)))
        generator = torch.Generator().manual_seed(seed_of(seed, "passes"))
        for _ in range(1, self.config.num_ppo_epochs):
            order = torch.randperm(len(samples), generator=generator).tolist()
            steps += [[samples[i] for i in order[a : a + size]] for a in range(0, len(samples), size)]
        return steps

    def score(
        self, prompts: Sequence[Prompt], made: list[Completion], log: MetricsLogger
    ) -> tuple[Scores, Tensor]:
        """The rewards as they were given, and [S] what is trained on: less the penalty for having no end."""
        with log.timing("reward"):
            scores = self.scorer.score(prompts, made)
        total = scores.total.clone()
        if self.config.missing_eos_penalty is not None:
            cut = torch.tensor([c.truncated for c in made])
            total[cut] -= self.config.missing_eos_penalty
        return scores, total

    @torch.no_grad()
    def give_statistics(self, samples: list[Sample], log: MetricsLogger) -> None:
        """Old and reference log-probs and values, one number a trained token; the value after the last one, if cut."""
        setting, model = self.setting, self.setting.model
        give_logprobs(setting, model.actor, "old_logprobs", samples, self.how, log)
        if setting.reference is not None:
            give_logprobs(setting, setting.reference, "ref_logprobs", samples, self.how, log)
        micros = setting.plan(samples)
        with log.timing("values"):
            for micro in micros:
                in_parts(setting, self.give_values, micro)
            exchange(samples, micros, ["old_values", "value_after"], setting.world)

    @torch.no_grad()
    def give_values(self, micro: MicroBatch) -> None:
        with self.how.context(self.setting.device):
            values = self.setting.model.critic.values(micro.input_ids, micro.cu_seqlens)
        attach(micro, "old_values", values[micro.rows])
        for sample, value in zip(micro.samples, values[micro.ends].tolist(), strict=not micro.empty):
            sample.fields["value_after"] = value

    def give_advantages(self, samples: list[Sample], total: Tensor, log: MetricsLogger) -> None:
        """Token rewards (the KL inside), GAE, whitening: over everything sampled at once, so no cut shows in it."""
        config = self.config
        lengths = torch.tensor([s.num_trained for s in samples])
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

        def column(name: str) -> Tensor:
            return torch.tensor([x for s in samples for x in s.fields[name]], dtype=torch.float64)

        old, values = column("old_logprobs"), column("old_values")
        kl = torch.zeros_like(old)
        if self.setting.reference is not None:
            kl = losses.kl_estimate(config.kl_estimator, old, column("ref_logprobs"))
        rewards = token_rewards(total.double().nan_to_num(0.0), cu_seqlens, kl=kl, beta=config.kl_coef)
        if config.whiten_rewards:
            rewards = whitened(rewards, shift_mean=False).double()
        after = torch.tensor([s.fields["value_after"] * s.fields["cut"] for s in samples], dtype=torch.float64)
        bootstrap = after if config.bootstrap_truncated else None
        how = {"gamma": config.gamma, "lam": config.lam, "bootstrap": bootstrap}
        advantages, returns = gae(rewards, values, cu_seqlens, **how)
        if config.whiten_advantages:
            advantages = whitened(advantages)
        log.add_mean(known_values(objective_metrics(total, kl, old, cu_seqlens, config.kl_coef)))
        log.add_mean({"val/explained_variance": explained_variance(values, returns)})
        bounds = cu_seqlens.tolist()
        for sample, a, b in zip(samples, bounds, bounds[1:], strict=False):
            sample.fields |= {"advantages": advantages[a:b].tolist(), "returns": returns[a:b].tolist()}
            for name in ("value_after", "cut", "ref_logprobs"):
                sample.fields.pop(name, None)

    @torch.no_grad()
    def evaluate(self, log: MetricsLogger) -> dict[str, float]:
        """Rewards of one completion of each held-out prompt; the same draws every time."""
        if not self.held_out:
            return {}
        config = self.config
        temperature = config.temperature if config.eval_temperature is None else config.eval_temperature
        sampling = Sampling(config.max_completion_length, temperature)
        with log.timing("eval"):
            with self.how.context(self.setting.device):
                seed = seed_of(config.seed, "held out")
                made = self.sampler.generate([p.ids for p in self.held_out], sampling, 1, seed)
            made = [group[0] for group in made]
            scores, total = self.score(self.held_out, made, log)
        values = reward_means(scores) | completion_metrics(made, config.max_completion_length)
        values["objective/scores"] = float(total.nanmean())
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


def sample_of(prompt: Prompt, completion: Completion, reward: float) -> Sample:
    """Token-exact; one that no reward function could score is not trained."""
    sample = Sample.from_parts(prompt.ids, completion.ids, cut=float(completion.truncated))
    if reward != reward:
        sample = dataclasses.replace(sample, completion_mask=[False] * len(sample))
    return sample


# -- numbers for the reader --------------------------------------------------------------------------------------------
def reward_means(scores: Scores) -> dict[str, float]:
    """reward, and each function's mean and std, over what could be scored."""
    out = {}
    for name, values in {"": scores.total, **scores.by_function}.items():
        seen = values[~values.isnan()].double()
        key = f"rewards/{name}/mean" if name else "reward"
        out[key] = float(seen.mean())  # NaN of none
        if name:
            out[f"rewards/{name}/std"] = float(seen.std()) if seen.numel() > 1 else 0.0
    return out


def objective_metrics(total: Tensor, kl: Tensor, old: Tensor, cu_seqlens: Tensor, beta: float) -> dict[str, Tensor]:
    """TRL's objective/*: sums over a completion, means over completions."""
    count = max(1, cu_seqlens.shape[0] - 1)
    seen = total[~total.isnan()].double()
    scores = seen.mean()  # NaN of none
    non_score = -beta * kl.sum() / count
    return {
        "objective/kl": kl.sum() / count,
        "objective/entropy": -old.sum() / count,
        "objective/non_score_reward": non_score,
        "objective/scores": scores,
        "objective/rlhf_reward": scores + non_score,
    }


def explained_variance(values: Tensor, returns: Tensor) -> Tensor:
    """1 - var(R - V) / var(R): 1 is a perfect critic, 0 one that knows the mean alone."""
    spread = returns.double().var(unbiased=False) if returns.numel() else torch.zeros(())
    if not spread > 1e-12:
        return torch.zeros(())
    return 1 - (returns.double() - values.double()).var(unbiased=False) / spread


# -- building ----------------------------------------------------------------------------------------------------------
def load_model(config: PPOConfig, path: str, options: dict[str, Any]) -> ActorCritic:
    """The policy, and its critic: of --value_model_path, else saved beside it, else the reward model or its own body.

    A checkpoint's own critic comes before --value_model_path: the run that it continues started from that.
    """
    actor = load_causal_lm(path, **options)
    beside = Path(path) / CRITIC
    asked = config.value_model_path if path == config.model_name_or_path else None
    saved = str(beside) if beside.is_dir() else None
    base = base_of(path)  # of a policy that is adapters
    own, revision = (path, options["revision"]) if base is None else base
    start = asked or saved or config.value_model_path or config.reward_model_path or own
    how = {**options, "revision": revision if start == own else "main", "quantisation": None}  # it is trained whole
    critic = load_reward_model(start, **how)
    rows, words = critic.model.get_input_embeddings().weight.shape[0], len(options["tokenizer"])
    if words > rows:
        raise ValueError(f"the tokenizer has {words} tokens but the critic of {start} only {rows} rows for them")
    name = "value_clip" if config.value_loss == "clip" else "value_huber"
    value_objective = losses.get(name, cliprange=config.cliprange_value)
    return ActorCritic(actor, critic, value_objective, config.vf_coef)


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> PPOStage:
    config: PPOConfig = setting.config
    context = setting.model.context_length
    room = None if context is None else context - config.max_completion_length
    if room is not None and room < 1:
        raise DataError(
            f"--max_completion_length {config.max_completion_length} leaves no room for a prompt in the models' "
            f"context of {context} tokens; lower it"
        )
    longest = min((n for n in (room, config.max_prompt_length) if n is not None), default=None)

    def encode(rows: Rows | None, split: str) -> list[Prompt]:
        if rows is None:
            return []
        return noted(notes, split, encode_prompts(rows, setting.tokenizer, longest, config.max_dropped_fraction))

    sampler = shared_sampler(TransformersSampler(setting.model.model, setting.tokenizer), setting.model.actor, setting)
    scorer = load_rewards(config.rewards, config.reward_weights, setting.tokenizer, opener(setting))
    scorer = SharedScorer(scorer, setting.world)
    return PPOStage(setting, encode(train, "train"), encode(test, "test"), sampler, scorer)
