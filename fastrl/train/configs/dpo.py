"""Flags of `fastrl dpo`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.configs.base import DatasetConfig
from fastrl.train.flags import ConfigError, flag

AGAINST_REFERENCE = (
    "sigmoid", "dpo", "dpo_nll", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "r_dpo", "sampo", "d2po", "gpo", "chi_po",
    "dpop", "dpo_shift", "minor_dpo", "cal_dpo", "vpo", "spin", "ipo_md", "dil", "alpha_dpo", "dr_dpo",
)  # fmt: skip
WITHOUT_REFERENCE = ("sft", "simpo", "alphapo", "cpo", "orpo", "slic", "simper")
WITH_SCORES = ("odpo", "mmpo", "rdo")  # read the columns score_chosen and score_rejected
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(kw_only=True)
class ReferenceConfig(DatasetConfig):
    """Flags about the reference model, of stages that have one."""

    beta: float = flag(0.1, "Strength of the tie to the reference model; the scale of the margin.", above=0)
    disable_dropout: bool = flag(True, "Turn dropout off in the policy and the reference.")
    precompute_ref_log_probs: bool = flag(
        False, "Score the whole dataset with the reference before the first step, then let the reference go."
    )
    sync_ref_model: bool = flag(
        False, "Move the reference towards the policy now and then: ref <- a policy + (1 - a) ref."
    )
    ref_model_mixup_alpha: float = flag(0.6, "a of sync_ref_model.", at_least=0, at_most=1)
    ref_model_sync_steps: int = flag(512, "Optimizer steps between two moves of the reference.", at_least=1)

    @property
    def needs_reference(self) -> bool:
        """Whether a frozen copy of the starting model is loaded beside the policy."""
        return True

    def _check(self) -> None:
        super()._check()
        self._check_sync()

    def _check_sync(self) -> None:
        for name in ("ref_model_mixup_alpha", "ref_model_sync_steps"):
            value = getattr(self, name)
            if not self.sync_ref_model and value != self.__dataclass_fields__[name].default:
                raise ConfigError(f"--{name} {value:g} is read with --sync_ref_model true alone; give that, or drop it")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise ConfigError(
                "--sync_ref_model moves the reference and --precompute_ref_log_probs scores with it once; give one"
            )
        if self.sync_ref_model and not self.needs_reference:
            raise ConfigError("--sync_ref_model: these losses have no reference model; drop it")


@dataclass(kw_only=True)
class DPOConfig(ReferenceConfig):
    """`fastrl dpo`: preference pairs, most losses against a frozen copy of the starting model."""

    stage: ClassVar[str] = "dpo"
    unit: ClassVar[str] = "pairs"
    learning_rate: float = flag(1e-6, "Peak learning rate.", at_least=0)
    loss_type: list[str] = flag(
        ["sigmoid"],
        "The objective, or several to be summed; `fastrl losses NAME` explains one. The last three need the columns "
        "score_chosen and score_rejected.",
        choices=(*AGAINST_REFERENCE, *WITHOUT_REFERENCE, *WITH_SCORES),
    )
    beta: float | None = flag(
        None, "Strength of the tie to the reference model; the scale of the margin. none: the loss's own, which is 0.1 "
        "but for slic 1, alpha_dpo 2.5, and simpo and alphapo 2 (TRL's simpo: 0.1).", above=0,
    )  # fmt: skip
    loss_weights: list[float] | None = flag(None, "One weight for each loss_type; none means 1 each.")
    label_smoothing: float | None = flag(
        None, "Assumed part of flipped labels; for sigmoid too (cDPO), which TRL leaves as it is. none: the loss's "
        "own, which is 0 but for robust 0.1 and exo_pair 1e-3.", at_least=0, below=0.5,
    )  # fmt: skip
    reference_free: bool = flag(False, "Take the reference's log-probs as 0; no reference model is loaded.")
    f_divergence_type: str = flag("reverse_kl", "Divergence that ties to the reference.", choices=F_DIVERGENCES)
    f_alpha_divergence_coef: float = flag(0.5, "alpha of alpha_divergence.")
    use_weighting: bool = flag(False, "Weigh pairs by how likely the policy is to write them itself (WPO).")
    ld_alpha: float | None = flag(
        None, "Weight of tokens past the shorter answer's length (LD-DPO); none: 1.", at_least=0, at_most=1
    )
    discopop_tau: float = flag(0.05, "Temperature of discopop's gate.", above=0)
    rpo_alpha: float | None = flag(
        None, "Add this times the chosen's mean negative log-likelihood (the loss sft).", at_least=0
    )
    simpo_gamma: float = flag(0.5, "Target margin of simpo and alphapo.")
    cpo_alpha: float = flag(1.0, "Weight of the chosen's negative log-likelihood in cpo, orpo and dpo_nll.", at_least=0)
    alpha: float = flag(0.25, "Shape of alphapo's reward; 0 is simpo (TRL's default).")

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        super().__post_init__()

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free and any(name not in WITHOUT_REFERENCE for name in self.loss_type)

    def _check(self) -> None:
        if not self.loss_type:
            raise ConfigError("--loss_type needs at least one name, such as sigmoid")
        super()._check()
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            n, m = len(self.loss_weights), len(self.loss_type)
            raise ConfigError(f"--loss_weights has {n} numbers for {m} of --loss_type; give one for each")
        alpha = self.f_alpha_divergence_coef
        if alpha != 0.5 and self.f_divergence_type != "alpha_divergence":
            raise ConfigError(
                f"--f_alpha_divergence_coef {alpha:g} changes nothing in --f_divergence_type {self.f_divergence_type}; "
                "use --f_divergence_type alpha_divergence, or drop it"
            )
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise ConfigError("--loss_type exo_pair needs --label_smoothing above 0; its paper has 1e-3")

    def losses(self) -> tuple[list[str], list[float] | None]:
        """(names, weights), the term of rpo_alpha among them."""
        if not self.rpo_alpha:
            return self.loss_type, self.loss_weights
        weights = [1.0] * len(self.loss_type) if self.loss_weights is None else self.loss_weights
        return [*self.loss_type, "sft"], [*weights, self.rpo_alpha]
