"""KTO: single answers of the dataset, desirable or not, held against the KL of prompts with other prompts' answers."""

from __future__ import annotations

import math

from fastrl import losses
from fastrl.data import Rows, encode_kto
from fastrl.data.types import Sample
from fastrl.train.metrics import MetricsLogger
from fastrl.train.stages.base import Setting, give_logprobs, limits_of, noted
from fastrl.train.stages.reference import ReferenceStage
from fastrl.train.step import MicroBatch


class KTOStage(ReferenceStage):
    """Before each step the mismatched pairs are scored once by policy and reference, without gradient."""

    def __init__(self, setting: Setting, samples: list[Sample], held_out: list[Sample]):
        super().__init__(setting, [[s] for s in samples], [[s] for s in held_out])
        config = setting.config
        self.objective = losses.get(
            config.loss_type,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        if config.precompute_ref_log_probs:
            self.precompute()

    def prepare(self, samples: list[Sample], log: MetricsLogger) -> list[MicroBatch]:
        if self.setting.config.loss_type == "kto":
            samples = [Sample(s.input_ids, s.prompt_length, s.completion_mask, dict(s.fields)) for s in samples]
            for sample, kl in zip(samples, self.mismatched_kl(samples, log), strict=True):
                sample.fields["kl"] = kl
        return super().prepare(samples, log)

    def mismatched_kl(self, samples: list[Sample], log: MetricsLogger) -> list[float]:
        """log pi / ref of every prompt with the answer before it; NaN where it has no token within the limit.

        A single answer has no other before it: NaN, so that the step's z is 0.
        """
        if len(samples) < 2:
            return [math.nan] * len(samples)
        setting, longest = self.setting, limits_of(self.setting.config, self.setting.model).longest
        others = [mismatched(a, b, longest) for a, b in zip(samples, samples[-1:] + samples[:-1], strict=True)]
        give_logprobs(setting, setting.model, "old_logprobs", others, self.how, log)
        give_logprobs(setting, setting.reference, "ref_logprobs", others, self.how, log)
        return [
            math.fsum(s.fields["old_logprobs"]) - math.fsum(s.fields["ref_logprobs"]) if s.num_trained else math.nan
            for s in others
        ]


def mismatched(asked: Sample, answered: Sample, longest: int | None) -> Sample:
    """The prompt of one sample with the answer of another, cut at `longest` tokens."""
    prompt, answer = asked.input_ids[: asked.prompt_length], answered.input_ids[answered.prompt_length :]
    room = len(answer) if longest is None else max(0, longest - len(prompt))
    return Sample.from_parts(prompt, answer[:room])


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> KTOStage:
    def encode(rows: Rows | None, split: str) -> list[Sample]:
        if rows is None:
            return []
        return noted(notes, split, encode_kto(rows, setting.tokenizer, limits_of(setting.config, setting.model)))

    samples = encode(train, "train")
    notes += balance(setting.config, samples)
    return KTOStage(setting, samples, encode(test, "test"))


def balance(config, samples: list[Sample]) -> list[str]:
    """A note where one label has far more say: its paper (eq. 8) has desirable to undesirable at 1 to 4/3."""
    good = sum(s.fields["label"] for s in samples)
    bad = len(samples) - good
    if not good or not bad:
        return [f"every answer is {'desirable' if good else 'undesirable'}; kto learns from the contrast of both"]
    ratio = config.desirable_weight * good / max(config.undesirable_weight * bad, 1e-12)
    if good == bad or 3 / 4 - 1e-9 <= ratio <= 4 / 3 + 1e-9:
        return []
    fit = f"--desirable_weight {config.undesirable_weight * bad / good:.3g}"
    return [f"{good} desirable and {bad} undesirable answers weigh {ratio:.3g} to 1; {fit} would balance them"]
