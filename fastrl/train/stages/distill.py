"""Distillation: prompts of the dataset x texts of dataset, student or teacher x a divergence from the teacher.

The teacher's hidden states come from its own packed body and go with its head into the fused operator: the logits of
neither model are formed.
"""

from __future__ import annotations

import copy
import dataclasses
import random

import torch

from fastrl import losses
from fastrl.data import Rows, encode_sft
from fastrl.data.tokenize import Limits
from fastrl.data.types import DataError, Sample
from fastrl.models import PackedModel, load_reference, load_tokenizer
from fastrl.models.ulysses import split_sequences
from fastrl.objective import Objective
from fastrl.ops.distill import Teacher
from fastrl.rollout import Sampler, Sampling, TransformersSampler, seed_of
from fastrl.train.config import DistillConfig
from fastrl.train.configs.distill import SAMPLED
from fastrl.train.exchange import shared_sampler
from fastrl.train.flags import ConfigError
from fastrl.train.metrics import MetricsLogger
from fastrl.train.stages.base import DatasetStage, Setting, give_logprobs, limits_of, noted, teacher_of
from fastrl.train.stages.grpo_metrics import completion_metrics
from fastrl.train.step import Forward, MicroBatch

WITH_OLD = ("iw_opd", "minillm")  # read whole sequences of the sampling policy's log-probs


def objective_of(config: DistillConfig) -> Objective:
    """The objective that --loss_type names, with those flags that were given as its numbers.

    Raises ValueError for a number that the loss does not have.
    """
    known = {f.name for f in dataclasses.fields(losses.law(config.loss_type))}
    given = {"alpha": config.alpha, "nll_coef": config.nll_coef, "gamma": config.gamma}
    numbers = {name: value for name, value in given.items() if value is not None}
    if config.distill_temperature is not None:
        numbers["temperature"] = config.distill_temperature
    if "beta" in known:
        numbers["beta"] = config.beta
    return losses.get(config.loss_type, **numbers)


class DistillStage(DatasetStage):
    """Who writes the texts is drawn for every step; the objective is the same whoever wrote them."""

    def __init__(self, setting: Setting, teacher: PackedModel, samples: list[Sample], held_out: list[Sample]):
        super().__init__(setting, [[s] for s in samples], [[s] for s in held_out])
        config: DistillConfig = setting.config
        self.config, self.teacher, self.taken = config, teacher, 0
        self.objective = objective_of(config)
        self.sampled = config.loss_type in SAMPLED
        head = self.teacher_head if "divergence" in getattr(self.objective, "outputs", ()) else None
        temperature = config.temperature if self.sampled else 1.0
        self.how = Forward(temperature, (), setting.autocast, config.debug_checks, head)
        self.sampling = Sampling(config.max_new_tokens, config.temperature)
        models = {"student": setting.model, "teacher": teacher}
        self.writers: dict[str, Sampler] = {
            n: shared_sampler(TransformersSampler(m.model, setting.tokenizer), m, setting)
            for n, m in models.items()
            if config.samples
        }

    # -- the teacher's part ------------------------------------------------------------------------------------------
    def teacher_head(self, micro: MicroBatch) -> Teacher:
        return teacher_of(self.teacher, micro, self.setting.model.head.out_features)

    def prepare(self, samples: list[Sample], log: MetricsLogger) -> list[MicroBatch]:
        """Pack; the sampled-token losses get both models' log-probs of the tokens first."""
        samples = [Sample(s.input_ids, s.prompt_length, s.completion_mask, dict(s.fields)) for s in samples]
        models = {"teacher_logprobs": self.teacher} if self.sampled else {}
        if self.sampled and self.config.loss_type in WITH_OLD:
            models["old_logprobs"] = self.setting.model
        for name, model in models.items():
            give_logprobs(self.setting, model, name, samples, self.how, log)
        return self.setting.plan(samples)

    # -- texts -------------------------------------------------------------------------------------------------------
    def collect(self, log: MetricsLogger) -> list[MicroBatch]:
        rows = self.order.take(self.config.batch_size)
        samples, writer = [self.items[i][0] for i in rows], self.writer()
        self.taken += 1
        log.add_mean({"on_policy": float(writer == "student")})
        return self.prepare(samples if writer is None else self.write(samples, writer, log), log)

    def writer(self) -> str | None:
        """Whose texts this step trains on: "student" in a share lmbda of the steps, else "teacher" or the dataset's."""
        if random.Random(f"{self.config.seed} {self.taken}").random() < self.config.lmbda:
            return "student"
        return "teacher" if self.config.seq_kd else None

    def write(self, samples: list[Sample], writer: str, log: MetricsLogger) -> list[Sample]:
        """The same prompts with completions that the writer samples."""
        prompts = [s.input_ids[: s.prompt_length] for s in samples]
        with log.timing("gen"), self.how.context(self.setting.device):
            seed = seed_of(self.config.seed, self.taken)  # of these draws, on every rank
            made = [c for [c] in self.writers[writer].generate(prompts, self.sampling, 1, seed)]
        log.add_mean(completion_metrics(made, self.config.max_new_tokens))
        return [Sample.from_parts(p, c.ids) for p, c in zip(prompts, made, strict=True)]

    def evaluate(self, log: MetricsLogger) -> dict[str, float]:
        """On the held-out texts: the objective, or where it needs samples the reverse KL that it stands for."""
        if not self.sampled:
            return super().evaluate(log)
        stage = copy.copy(self)
        stage.objective, stage.sampled = losses.get("reverse_kl"), False
        stage.how = dataclasses.replace(self.how, teacher=self.teacher_head)
        return DatasetStage.evaluate(stage, log)

    def state_dict(self) -> dict:
        return {**super().state_dict(), "taken": self.taken}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.taken = state["taken"]


# -- building it -----------------------------------------------------------------------------------------------------
def load_teacher(setting: Setting) -> PackedModel:
    """The frozen teacher. Raises ConfigError if there is none, or if its words are not the student's."""
    config: DistillConfig = setting.config
    path, revision = config.teacher_model_name_or_path, config.teacher_model_revision
    if not path:
        raise ConfigError("--teacher_model_name_or_path is required; give a directory or a model of the hub")
    theirs, ours = load_tokenizer(path, revision=revision).get_vocab(), setting.tokenizer.get_vocab()
    if theirs != ours:
        different = len({*theirs.items()} ^ {*ours.items()})
        raise ConfigError(
            f"the tokenizers of {config.model_name_or_path} and {path} differ in {different} entries, so their "
            "probabilities are of different words; take a teacher with the student's tokenizer, or train on texts that "
            "it wrote with `fastrl sft`"
        )
    kind = config.teacher_dtype or config.dtype
    teacher = load_reference(
        path, "auto" if kind == "auto" else getattr(torch, kind), config.attn_implementation, revision=revision,
        tokenizer=setting.tokenizer,
    ).to(setting.device)  # fmt: skip
    split_sequences(teacher, setting.world.sequence_group)
    words, known = setting.model.head.out_features, teacher.head.out_features
    if known < words:
        raise ConfigError(
            f"the student's head has {words} words but that of {path} only {known}; resize the student's embeddings to "
            f"{known} (the tokenizer has {len(ours)}) and save it first"
        )
    return teacher


def check_room(samples: list[Sample], config: DistillConfig, context: int | None) -> None:
    """Raises DataError where there is no prompt to sample from, or no room for a completion."""
    if any(s.prompt_length < 2 and s.completion_mask[1:2] == [True] for s in samples):
        raise DataError(
            "sampling needs prompts: give the columns prompt and completion, or train on the dataset's texts alone "
            "with --lmbda 0 --seq_kd false"
        )
    longest = max(s.prompt_length for s in samples)
    if context is not None and longest + config.max_new_tokens > context:
        raise DataError(
            f"the longest prompt has {longest} tokens; with --max_new_tokens {config.max_new_tokens} that is more than "
            f"the model's context of {context}; lower one of them (--max_length drops long rows)"
        )


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> DistillStage:
    config: DistillConfig = setting.config
    teacher = load_teacher(setting)
    contexts = [m.context_length for m in (setting.model, teacher) if m.context_length is not None]
    limits = dataclasses.replace(limits_of(config, setting.model), context_length=min(contexts, default=None))

    def encode(rows: Rows | None, split: str, limits: Limits) -> list:
        return [] if rows is None else noted(notes, split, encode_sft(rows, setting.tokenizer, limits))

    samples = encode(train, "train", limits)
    if config.samples:
        check_room(samples, config, limits.context_length)
    return DistillStage(setting, teacher, samples, encode(test, "test", limits))
