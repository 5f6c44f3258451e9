"""Flags of `fastrl distill`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.base import DTYPES, DatasetConfig
from fastrl.train.flags import ConfigError, flag

FULL = ("gkd", "forward_kl", "reverse_kl", "mixed_kl", "jeffreys", "tvd", "skew_kl", "skew_rkl", "kd")
SAMPLED = ("opd", "opd_is", "iw_opd", "minillm")  # weigh the student's own tokens, so they need its samples


@dataclass(kw_only=True)
class DistillConfig(DatasetConfig):
    """`fastrl distill`: a student learns from a teacher, on texts of the dataset, of the student or of the teacher."""

    stage: ClassVar[str] = "distill"
    needs_reference: ClassVar[bool] = False
    learning_rate: float = flag(2e-5, "Peak learning rate.", at_least=0)

    # teacher
    teacher_model_name_or_path: str | None = flag(None, "Directory or hub name of the teacher; same tokenizer.")
    teacher_model_revision: str = flag("main", "Branch, tag or commit of the teacher.")
    teacher_dtype: str | None = flag(None, "Type of the teacher's weights; none: --dtype.", choices=DTYPES)

    # whose texts
    lmbda: float = flag(0.5, "Share of the steps on completions that the student samples.", at_least=0, at_most=1)
    seq_kd: bool = flag(False, "The other steps train on completions that the teacher samples, not the dataset's.")
    temperature: float = flag(
        0.9, "Of sampling; the sampled-token losses (opd, ...) take both models' log-probs at it too.", above=0
    )
    max_new_tokens: int = flag(128, "Most new tokens of a completion.", at_least=1)

    # objective
    loss_type: str = flag("gkd", "The objective; see `fastrl losses NAME`.", choices=(*FULL, "seq_kd", *SAMPLED))
    beta: float = flag(0.5, "gkd: 0 is KL(teacher||student), 1 its reverse, between: JSD.", at_least=0, at_most=1)
    alpha: float | None = flag(
        None, "mixed_kl: share of KL(teacher||student); skew: of the mixture; kd: of the likelihood. none: the loss's."
    )
    nll_coef: float | None = flag(None, "Weight of the likelihood beside a divergence.", at_least=0)
    distill_temperature: float | None = flag(
        None, "Softens both models in the divergence; none: 1 (kd: 2, with the factor temperature^2).", above=0
    )
    gamma: float | None = flag(
        None, "iw_opd: strength of the weights; minillm: discount. none: the loss's.", at_least=0
    )
    disable_dropout: bool = flag(True, "Turn dropout off in the student.")

    def _check(self) -> None:
        super()._check()
        if self.beta != 0.5 and self.loss_type != "gkd":
            raise ConfigError(f"--beta {self.beta:g} is read by gkd, not by --loss_type {self.loss_type}; drop it")
        if self.loss_type in SAMPLED and self.lmbda < 1:
            raise ConfigError(
                f"--loss_type {self.loss_type} weighs tokens that the student sampled, --lmbda {self.lmbda:g} would "
                "also feed it others; use --lmbda 1"
            )
        if self.loss_type == "seq_kd" and self.lmbda > 0:
            raise ConfigError(
                f"--loss_type seq_kd is the likelihood of the teacher's texts, --lmbda {self.lmbda:g} would train the "
                "student on its own; use --lmbda 0, with --seq_kd true unless the dataset holds the teacher's texts"
            )

    @property
    def samples(self) -> bool:
        """Whether anything is sampled."""
        return self.lmbda > 0 or self.seq_kd
