"""Flags of `fastrl sft`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.base import DatasetConfig
from fastrl.train.flags import ConfigError, flag

# loss_type -> (field of a sample, the dataset's column that it is read from unless --signal_column says another).
SIGNALS = {
    "weighted_sft": ("weights", "weight"),
    "c_rlft": ("label", "label"),
    "unlikelihood": ("label", "label"),
    "rwr": ("reward", "reward"),
    "awr": ("advantage", "advantage"),
}
READ_BY = {  # flag -> the losses that read it
    "z_loss": ("z_loss",),
    "focal_gamma": ("focal",),
    "entropy_coef": ("confidence_penalty",),
    "eos_weight": ("eos_weighted",),
    "normalise_weights": ("weighted_sft",),
    "unlikelihood_alpha": ("unlikelihood",),
    "negative_weight": ("c_rlft",),
    "tau": ("rwr", "awr"),
    "max_weight": ("awr",),
}
LOSSES = ("nll", "dft", "label_smoothing", "z_loss", "focal", "confidence_penalty", "eos_weighted", *SIGNALS)


@dataclass(kw_only=True)
class SFTConfig(DatasetConfig):
    """`fastrl sft`: next-token likelihood of completions, answers or whole texts."""

    stage: ClassVar[str] = "sft"
    learning_rate: float = flag(2e-5, "Peak learning rate.", at_least=0)
    completion_only_loss: bool | None = flag(
        None, "Train the completion only (true) or the prompt too (false). none: completion only if there is a prompt."
    )
    assistant_only_loss: bool = flag(False, "Train only the assistant's turns of a conversation.")
    loss_type: str = flag("nll", "The objective; see `fastrl losses NAME`.", choices=LOSSES)
    label_smoothing_factor: float = flag(
        0.0, "Share of the target mass spread over the vocabulary (nll, label_smoothing).", at_least=0, below=1
    )
    z_loss: float = flag(1e-4, "Weight of logsumexp^2 (z_loss).", at_least=0)
    focal_gamma: float = flag(2.0, "Exponent of 1 - pi (focal).", at_least=0)
    entropy_coef: float = flag(0.1, "Weight of the entropy bonus (confidence_penalty).")
    eos_weight: float = flag(1.0, "Weight of the end-of-sequence token (eos_weighted).", at_least=0)
    signal_column: str | None = flag(
        None, "Column with each row's weight, label, reward or advantage; none: weight, label, reward, advantage."
    )
    normalise_weights: bool = flag(False, "Divide the loss by the sum of the weights (weighted_sft).")
    unlikelihood_alpha: float = flag(1.0, "Weight of undesirable rows (unlikelihood).", at_least=0)
    negative_weight: float = flag(0.1, "Weight of rows of the worse class (c_rlft).", at_least=0)
    tau: float = flag(1.0, "Temperature of rewards or advantages (rwr, awr).", above=0)
    max_weight: float = flag(20.0, "Largest weight of a row (awr).", above=0)

    def _check(self) -> None:
        super()._check()
        if self.label_smoothing_factor and self.loss_type not in ("nll", "label_smoothing"):
            raise ConfigError(
                f"--label_smoothing_factor {self.label_smoothing_factor:g} with --loss_type {self.loss_type} would "
                "change nothing; use --loss_type nll, or drop it"
            )
        if self.loss_type == "label_smoothing" and not self.label_smoothing_factor:
            raise ConfigError("--loss_type label_smoothing needs --label_smoothing_factor above 0, such as 0.1")
        if self.signal_column is not None and self.loss_type not in SIGNALS:
            known = ", ".join(SIGNALS)
            raise ConfigError(f"--signal_column is read by {known}, not by --loss_type {self.loss_type}; drop it")
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name, readers in READ_BY.items():
            value = getattr(self, name)
            if self.loss_type not in readers and value != self.__dataclass_fields__[name].default:
                raise ConfigError(
                    f"--{name} {value} is read by {' and '.join(readers)}, not by --loss_type {self.loss_type}; drop it"
                )
        if self.loss_type == "eos_weighted" and self.eos_weight == 1:
            raise ConfigError("--loss_type eos_weighted with --eos_weight 1 is plain nll; give another, such as 2")
