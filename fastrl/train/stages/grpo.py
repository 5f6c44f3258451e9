"""GRPO and kin: prompts of the dataset x completions of the policy x advantages relative to the prompt's group."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.advantages import estimate, group_normalised
from fastrl.data import Rows, encode_prompts
from fastrl.data.sampler import IndexSampler
from fastrl.data.types import DataError, Prompt, Sample
from fastrl.losses.regression import A2PO, optimal_value
from fastrl.models import PackedModel
from fastrl.objective import LossOutput
from fastrl.ops.distill import Teacher
from fastrl.rewards import load_rewards
from fastrl.rollout import Completion, Sampler, Sampling, TransformersSampler, seed_of
from fastrl.train.configs.grpo import named_values
from fastrl.train.configs.online import OnlineConfig
from fastrl.train.control import AdaptiveEntropy
from fastrl.train.exchange import SharedScorer, shared_sampler
from fastrl.train.flags import ConfigError
from fastrl.train.judges import opener
from fastrl.train.metrics import MetricsLogger
from fastrl.train.stages.base import Setting, give_logprobs, noted, teacher_of
from fastrl.train.stages.grpo_metrics import completion_metrics, known_values, mismatch_metrics, reward_metrics
from fastrl.train.stages.grpo_objective import objective_of, policy_of, reads_rollout, with_entropy
from fastrl.train.step import Forward, MicroBatch

READ_REWARDS = ("a2po", "vapo")  # losses that read the rewards themselves


def entropy_controller(config: OnlineConfig) -> AdaptiveEntropy | None:
    if not getattr(config, "use_adaptive_entropy", False):
        return None
    limits = {"low": config.entropy_coef_min, "high": config.entropy_coef_max}
    return AdaptiveEntropy(config.entropy_coef, config.entropy_target, config.entropy_coef_delta, **limits)


class GRPOStage:
    """Sample, score, normalise in the group; then as many optimizer steps as the sampled batch holds.

    Subclasses change the objective, the policies that score the samples, and the advantages.
    """

    def __init__(self, setting: Setting, prompts: list[Prompt], held_out: list[Prompt], sampler: Sampler, scorer):
        config: OnlineConfig = setting.config
        self.setting, self.config = setting, config
        self.prompts, self.held_out, self.sampler, self.scorer = prompts, held_out, sampler, scorer
        self.objective = self.make_objective()
        teacher = self.reference_head if getattr(config, "full_kl", False) else None
        self.how = Forward(config.temperature, ("entropy",), setting.autocast, config.debug_checks, teacher)
        asked = reads_rollout(self.objective)
        self.sampling = Sampling(config.max_completion_length, config.temperature, logprobs=asked)
        self.prompts_at_once = config.completions_per_generation // config.num_generations
        self.order = IndexSampler(len(prompts), config.seed)
        whole, rest = divmod(len(prompts), self.prompts_at_once)
        last = -(-rest // config.prompts_per_step) * config.num_iterations  # what is left of a pass fills fewer steps
        self.steps_per_epoch = whole * config.updates_per_generation + last
        self.pending: list[list[Sample]] = []  # optimizer steps sampled and not yet trained
        self.entropy = entropy_controller(config)
        self.entropy_seen: list[Tensor] = []  # of the micro-batches of the last step
        self.unsettled = False  # whether a step was trained whose entropy the controller has not heard of

    def watch(self, out: LossOutput, log: MetricsLogger) -> None:
        """After each micro-batch's backward."""
        if self.entropy is not None:
            self.entropy_seen.append(out.metrics["entropy"])

    def follow_entropy(self, log: MetricsLogger) -> None:
        """Set the bonus of the coming step by the entropy of the last."""
        if self.entropy is None:
            return
        self.settle_entropy()
        log.add_mean({"entropy_coef": self.entropy.coef})
        self.objective = with_entropy(self.objective, self.entropy.active)

    def settle_entropy(self) -> None:
        """Tell the controller of the step that was trained last, once."""
        if self.unsettled:  # every rank asks, also one that trained nothing
            mine = float(torch.stack(self.entropy_seen).sum()) if self.entropy_seen else 0.0
            self.entropy.update(self.setting.world.sums({"entropy": mine})["entropy"])
        self.entropy_seen, self.unsettled = [], False

    def collect(self, log: MetricsLogger) -> list[MicroBatch]:
        self.follow_entropy(log)
        if not self.pending:
            self.pending = self.roll_out(log)
        step = self.pending.pop(0)
        self.unsettled = self.entropy is not None and any(s.num_trained for s in step)
        return self.setting.plan(step)

    def roll_out(self, log: MetricsLogger) -> list[list[Sample]]:
        """Prompts -> completions -> rewards -> advantages: the samples of each optimizer step until the next call."""
        seed = seed_of(self.config.seed, self.order.epoch, self.order.offset)  # of these draws, on every rank
        prompts = [self.prompts[i] for i in self.order.take(self.prompts_at_once)]
        with log.timing("gen"), self.how.context(self.setting.device):
            made = self.sampler.generate([p.ids for p in prompts], self.sampling, self.config.num_generations, seed)
        samples, scores = self.score(prompts, made, log)
        log.add_mean(completion_metrics([c for group in made for c in group], self.config.max_completion_length))
        size = self.config.batch_size
        steps = [samples[i : i + size] for i in range(0, len(samples), size)]
        for step in steps:
            self.give_logprobs(step, log)
        groups = torch.tensor([s.fields["group_id"] for s in samples])
        _, std = group_normalised(scores.total, groups)
        log.add_mean(known_values(reward_metrics(scores, std, groups)))
        known = self.known(prompts, samples, scores, log)
        advantages = self.advantages(samples, scores.total, groups, known, log)
        for sample, advantage, reward in zip(samples, advantages.tolist(), scores.total.tolist(), strict=True):
            sample.fields["advantage"] = advantage
            if getattr(self.config, "loss_type", None) in READ_REWARDS:
                sample.fields["reward"] = reward
        if isinstance(policy_of(self.objective), A2PO):  # of whole groups, wherever the step is cut
            best = optimal_value(scores.total, groups, policy_of(self.objective).beta1)
            for sample, value in zip(samples, best.tolist(), strict=True):
                sample.fields["optimal_value"] = value
        return [step for _ in range(self.config.num_iterations) for step in steps]

    def make_objective(self):
        return objective_of(self.config)

    def advantages(
        self, samples: list[Sample], rewards: Tensor, groups: Tensor, known: dict[str, Tensor], log: MetricsLogger
    ) -> Tensor:
        """[S] of everything sampled at once."""
        name = self.config.advantage_estimator
        if name is None:
            return group_normalised(rewards, groups, self.config.scale_rewards)[0]
        return estimate(name, rewards, groups, columns=known, **named_values(self.config.advantage_options))

    def known(self, prompts: list[Prompt], samples: list[Sample], scores, log: MetricsLogger) -> dict[str, Tensor]:
        """What estimators may ask for beside the rewards (fastrl.advantages.COLUMNS); "remax" samples greedily."""
        weights = self.config.reward_weights or [1.0] * len(scores.by_function)
        made = {
            "lengths": torch.tensor([s.num_trained for s in samples]),
            "components": torch.stack(list(scores.by_function.values()), 1),
            "weights": torch.tensor(weights, dtype=torch.float64),
        }
        if getattr(self.config, "advantage_estimator", None) == "remax":
            with log.timing("gen"), self.how.context(self.setting.device):
                greedy = self.sampler.generate(
                    [p.ids for p in prompts], Sampling(self.config.max_completion_length, temperature=0.0), 1
                )
            with log.timing("reward"):
                baseline = self.scorer.score(prompts, [c for [c] in greedy]).total
            log.add_mean({"reward_greedy": baseline.nanmean()})
            made["greedy_rewards"] = baseline[[s.fields["group_id"] for s in samples]]
        return made

    def scored_by(self) -> dict[str, PackedModel]:
        """Old log-probs (a batch used for one update needs none: they are the current ones) and the reference's."""
        setting, config = self.setting, self.config
        models = {"ref_logprobs": setting.reference} if config.reads_ref_logprobs else {}
        old = config.updates_per_generation > 1 or reads_rollout(self.objective)
        return models | ({"old_logprobs": setting.model} if old else {})

    def reference_head(self, micro: MicroBatch) -> Teacher:
        """What the whole-vocabulary KL is taken to."""
        return teacher_of(self.setting.reference, micro, self.setting.model.head.out_features)

    def give_logprobs(self, samples: list[Sample], log: MetricsLogger) -> None:
        """What the policies of `scored_by` say of the samples. A loss whose ratio is to the sampler takes the model's
        own log-probs where the sampler gave none; a correction, which would then weigh by 1, refuses."""
        for name, model in self.scored_by().items():
            give_logprobs(self.setting, model, name, samples, self.how, log)
        means, maxima = mismatch_metrics(samples)
        log.add_mean(means)
        log.add_max(maxima)
        if policy_of(self.objective).anchor == "rollout":
            for sample in samples:
                sample.fields.setdefault("rollout_logprobs", sample.fields["old_logprobs"])

    def score(self, prompts: Sequence[Prompt], made: list[list[Completion]], log: MetricsLogger):
        """Token-exact samples of all completions, and their rewards."""
        samples = []
        for group_id, (prompt, completions) in enumerate(zip(prompts, made, strict=True)):
            for c in completions:
                sample = Sample.from_parts(prompt.ids, c.ids, group_id=group_id)
                if c.logprobs is not None:
                    sample.fields["rollout_logprobs"] = list(c.logprobs)
                if c.truncated and self.config.mask_truncated_completions:
                    sample = untrained(sample)
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
            with self.how.context(self.setting.device):
                seed = seed_of(config.seed, "held out")
                made = self.sampler.generate([p.ids for p in self.held_out], sampling, n, seed)
            samples, scores = self.score(self.held_out, made, log)
        groups = torch.tensor([s.fields["group_id"] for s in samples])
        _, std = group_normalised(scores.total, groups)
        flat = [c for group in made for c in group]
        values = reward_metrics(scores, std, groups) | completion_metrics(flat, config.max_completion_length)
        if n == 1:
            del values["frac_reward_zero_std"]  # a group of one has no spread to speak of
        return {f"eval_{name}": float(value) for name, value in values.items()}

    def state_dict(self) -> dict:
        """Data order, and the samples that wait for their optimizer step."""
        if self.entropy is not None:
            self.settle_entropy()
        return {
            "entropy": None if self.entropy is None else self.entropy.state_dict(),
            "order": self.order.state_dict(),
            "pending": [[dataclasses.asdict(s) for s in step] for step in self.pending],
        }

    def load_state_dict(self, state: dict) -> None:
        self.order.load_state_dict(state["order"])
        if self.entropy is not None and state.get("entropy"):
            self.entropy.load_state_dict(state["entropy"])
        self.pending = [[Sample(**s) for s in step] for step in state["pending"]]


def untrained(sample: Sample) -> Sample:
    """The same without a trained token, and so without numbers of any."""
    fields = {n: [] if isinstance(x, list) else x for n, x in sample.fields.items()}
    return dataclasses.replace(sample, completion_mask=[False] * len(sample), fields=fields)


def check_estimator(config: OnlineConfig) -> None:
    """Raises ConfigError for options that the advantage estimator does not have."""
    if (name := getattr(config, "advantage_estimator", None)) is None:
        return
    options = named_values(config.advantage_options)
    k = options.get("k", 4) if name in ("pass_at_k", "pkpo") else 0
    if isinstance(k, int) and k > config.num_generations:
        raise ConfigError(
            f"--advantage_estimator {name} of subsets of k={k} needs groups of as many completions, or trains nothing: "
            f"raise --num_generations {config.num_generations}, or give a lower --advantage_options k="
        )
    rewards, columns = torch.arange(config.num_generations).double(), {}
    columns |= {"lengths": torch.ones_like(rewards), "greedy_rewards": rewards, "components": rewards[:, None]}
    try:
        estimate(name, rewards, rewards.long() * 0, columns=columns, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"--advantage_estimator {name}: {error}") from error


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str], kind=GRPOStage) -> GRPOStage:
    config: OnlineConfig = setting.config
    check_estimator(config)
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

    sampler = shared_sampler(TransformersSampler(setting.model.model, setting.tokenizer), setting.model, setting)
    scorer = load_rewards(config.reward_funcs, config.reward_weights, setting.tokenizer, opener(setting))
    scorer = SharedScorer(scorer, setting.world)
    return kind(setting, encode(train, "train"), encode(test, "test"), sampler, scorer)
