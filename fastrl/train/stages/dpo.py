"""DPO: preference pairs of the dataset, coefficient -+beta * sigmoid(-margin) on their tokens, and its relatives."""

from __future__ import annotations

import dataclasses

from fastrl import losses
from fastrl.data import DataError, Rows, encode_dpo
from fastrl.data.types import Sample
from fastrl.objective import Objective
from fastrl.train.configs.dpo import WITH_SCORES, DPOConfig
from fastrl.train.flags import ConfigError
from fastrl.train.stages.base import Setting, limits_of, noted
from fastrl.train.stages.reference import ReferenceStage

# Flag -> (option of a loss, the losses whose option of that name it is; None: of every loss that has one).
OPTIONS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "beta": ("beta", None),
    "label_smoothing": ("label_smoothing", None),
    "reference_free": ("reference_free", None),
    "f_divergence_type": ("f_divergence", None),
    "f_alpha_divergence_coef": ("f_alpha", None),
    "use_weighting": ("use_weighting", None),
    "ld_alpha": ("ld_alpha", None),
    "discopop_tau": ("tau", ("discopop",)),
    "simpo_gamma": ("gamma", ("simpo", "alphapo")),
    "cpo_alpha": ("nll_coef", ("cpo", "orpo", "dpo_nll")),
    "alpha": ("alpha", ("alphapo",)),
}
UNREAD = {"beta": ("simper", "dil")}  # flag -> losses that inherit the option and whose law does not read it


class DPOStage(ReferenceStage):
    """pairs: chosen and rejected of each; the two never part, so a micro-batch always holds whole pairs."""

    unit = 2

    def __init__(self, setting: Setting, pairs: list[tuple[Sample, Sample]], held_out: list[tuple[Sample, Sample]]):
        super().__init__(setting, [list(p) for p in pairs], [list(p) for p in held_out])
        self.objective = objective_of(setting.config)
        if setting.config.precompute_ref_log_probs and setting.reference is not None:
            self.precompute()


def objective_of(config: DPOConfig) -> Objective:
    """The weighted sum of the losses; a flag that is none leaves each its own number.

    Raises ConfigError for a flag that was changed and that none of them reads.
    """
    names, weights = config.losses()
    terms, taken = [], set()
    for name in names:
        flags = flags_of(name)
        taken |= flags.keys()
        numbers = {option: getattr(config, flag) for flag, option in flags.items()}
        terms.append(losses.get(name, **{option: x for option, x in numbers.items() if x is not None}))
    for flag in OPTIONS:
        off = flag == "label_smoothing" and not config.label_smoothing  # 0 is what the others do
        if flag not in taken and not off and getattr(config, flag) != config.__dataclass_fields__[flag].default:
            raise ConfigError(f"--{flag} {getattr(config, flag)} changes nothing in {', '.join(names)}; drop it")
    if weights is None and len(terms) == 1:
        return terms[0]
    return losses.Sum(tuple(zip(weights or [1.0] * len(terms), terms, strict=True)))


def flags_of(name: str) -> dict[str, str]:
    """flag -> option of this loss."""
    known = {f.name for f in dataclasses.fields(losses.law(name))}
    return {
        flag: option
        for flag, (option, of) in OPTIONS.items()
        if option in known and (of is None or name in of) and name not in UNREAD.get(flag, ())
    }


def build(setting: Setting, train: Rows, test: Rows | None, notes: list[str]) -> DPOStage:
    def encode(rows: Rows | None, split: str) -> list:
        if rows is None:
            return []
        limits = limits_of(setting.config, setting.model)
        flat = noted(notes, split, encode_dpo(rows, setting.tokenizer, limits))
        check_scores(setting.config, flat, rows.name)
        return list(zip(flat[0::2], flat[1::2], strict=True))

    return DPOStage(setting, encode(train, "train"), encode(test, "test"))


def check_scores(config: DPOConfig, samples: list[Sample], where: str) -> None:
    """Raises DataError where a loss reads the scores of the answers and the rows of this split have none."""
    reading = [name for name in config.loss_type if name in WITH_SCORES]
    if reading and not all("reward" in sample.fields for sample in samples):
        raise DataError(
            f"--loss_type {reading[0]} reads how much better the chosen is; give {where} the number columns "
            "score_chosen and score_rejected"
        )
