"""Flags of `fastrl grpo`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from fastrl.train.configs.online import OnlineConfig
from fastrl.train.flags import ConfigError, flag, number

# Losses by the flags that they take. (fastrl.losses.POLICY without luffy: this stage has no demonstrations.)
CLIPPED = ("dapo", "grpo", "dr_grpo", "bnpo", "ppo_clip", "clip_cov", "decoupled_ppo", "vapo")  # and delta
RANGED = ("gspo", "gspo_token", "luspo", "gmpo", "rloo", "rollout_is", "ppo_two_sided")  # epsilon, epsilon_high
OTHERS = (
    "cispo", "sapo", "vespo", "reinforce", "gpg", "is_pg", "dppo_tv", "dppo_kl", "prime_rl", "prime_ipo", "topr",
    "kl_cov", "a2po", "opmd",
)  # fmt: skip
LEVELS = {  # importance_sampling_level -> TRL's loss_type -> the loss
    "token": {},
    "sequence": {"grpo": "gspo", "gspo": "gspo", "luspo": "luspo"},
    "sequence_token": {"grpo": "gspo_token", "gspo_token": "gspo_token"},
}
KINDS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+", "is_k1", "is_k3")
FULL = "full"
ESTIMATORS = (
    "grpo", "dr_grpo", "lite_ppo", "normalised", "rloo", "reinforce_pp", "reinforce_pp_baseline", "remax", "opo", "gpg",
    "pass_at_k_best", "pass_at_k", "pkpo", "max_rl", "gdpo", "a2po", "raw",
)  # fmt: skip


@dataclass(kw_only=True)
class GRPOConfig(OnlineConfig):
    """`fastrl grpo`: sample completions, score them, reinforce those above their group's mean."""

    stage: ClassVar[str] = "grpo"
    unit: ClassVar[str] = "completions"
    scale_rewards: str | bool = flag(
        "group", "Divide advantages by the std of the group, of the batch, or not.", choices=("group", "batch", "none")
    )
    advantage_estimator: str | None = flag(
        None, "Advantages by name; none: the group's mean off, then scale_rewards.", choices=ESTIMATORS
    )
    advantage_options: list[str] = flag([], "The estimator's own numbers, name=value.")

    # objective
    loss_type: str = flag("dapo", "The objective and its aggregation.", choices=(*CLIPPED, *RANGED, *OTHERS))
    importance_sampling_level: str = flag(
        "token", "sequence: grpo is gspo (and luspo itself); sequence_token: it is gspo_token.", choices=tuple(LEVELS)
    )
    loss_options: list[str] = flag([], "Further numbers of the objective, name=value; `fastrl losses NAME` lists them.")
    beta: float = flag(0.0, "Weight of the KL to the starting model; 0 needs no reference model.", at_least=0)
    kl_estimator: str = flag(
        "is_k3", "Estimator of that KL; k1 in a loss is noise; full: no estimate, KL of the whole vocabulary.",
        choices=(*KINDS, FULL),
    )  # fmt: skip
    use_bias_correction_kl: bool | None = flag(
        None, "TRL's name: true is kl_estimator is_k3, weighted by the ratio (DeepSeek-V3.2); false is k3."
    )
    epsilon: float | None = flag(
        None, "The ratio is clipped below 1 - epsilon (and above 1 + epsilon_high). none: 0.2; gspo, luspo, gmpo and "
        "vapo have their papers' ranges.", above=0
    )  # fmt: skip
    epsilon_high: float | None = flag(
        None, "Upper clip; none means epsilon. DAPO recommends 0.28. cispo: the largest ratio itself; none: 5.", above=0
    )
    delta: float | None = flag(None, "Dual clip: bound on the ratio where the advantage is negative.", above=0)
    sapo_temperature_pos: float = flag(1.0, "sapo: sharpness of the gate where the advantage is positive.", above=0)
    sapo_temperature_neg: float = flag(1.05, "sapo: where it is not.", above=0)
    vespo_k_pos: float = flag(2.0, "vespo: power of the weight where the advantage is positive.", at_least=0)
    vespo_lambda_pos: float = flag(3.0, "vespo: its decay there.", above=0)
    vespo_k_neg: float = flag(3.0, "vespo: power where the advantage is negative.", at_least=0)
    vespo_lambda_neg: float = flag(2.0, "vespo: its decay there.", above=0)
    entropy_coef: float = flag(
        0.0, "Weight of the entropy bonus, with its true gradient: the mean over tokens, of every loss_type."
    )
    use_adaptive_entropy: bool = flag(False, "Move entropy_coef by a step's entropy: up below the target, down above.")
    entropy_target: float = flag(0.2, "Nats a token to hold; the bonus rests while entropy is above.", at_least=0)
    entropy_coef_delta: float = flag(0.005, "How far entropy_coef moves in a step.", at_least=0)
    entropy_coef_min: float = flag(0.0, "Its lower bound.")
    entropy_coef_max: float = flag(1.0, "Its upper bound.")
    top_entropy_quantile: float = flag(
        1.0, "Part of the step's tokens, those of highest entropy, that the objective trains.", above=0, at_most=1
    )

    # samples of another policy (and importance_sampling_mode)
    off_policy_mask_threshold: float | None = flag(
        None, "Drop completions of negative advantage that the policy has left behind by more, in nats a token."
    )

    def __post_init__(self):
        if isinstance(self.scale_rewards, bool):
            self.scale_rewards = "group" if self.scale_rewards else "none"
        for name in ("loss_options", "advantage_options"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        taken = self._taken()
        for name in ("epsilon", "epsilon_high", "delta"):
            if getattr(self, name) is not None and name not in taken:
                raise ConfigError(f"--{name} {getattr(self, name):g} has no meaning for --loss_type {self.loss_type}")
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            bound = f"1 + epsilon_high = {1 + self.clip_high:g}"
            raise ConfigError(f"--delta {self.delta:g} must be above {bound}; raise it, or drop it for no dual clip")
        levels = LEVELS[self.importance_sampling_level]
        if levels and self.loss_type not in levels:
            raise ConfigError(
                f"--importance_sampling_level {self.importance_sampling_level} with --loss_type {self.loss_type} would "
                f"mix the ratio of sequences with another average; it goes with {', '.join(levels)}"
            )
        if (corrected := self.use_bias_correction_kl) is not None and self.kl_estimator not in ("k3", "is_k3"):
            shown = f"--use_bias_correction_kl {str(corrected).lower()} means {self.estimator}"
            raise ConfigError(f"{shown}; drop it, or --kl_estimator {self.kl_estimator}")
        self._check_unread()
        if self.entropy_coef_min > self.entropy_coef_max:
            bounds = f"{self.entropy_coef_min:g} --entropy_coef_max {self.entropy_coef_max:g}"
            raise ConfigError(f"--entropy_coef_min {bounds}: the first must not be above the second")
        for name in ("loss_options", "advantage_options"):
            for text in getattr(self, name):
                if not text.partition("=")[0].isidentifier() or "=" not in text:
                    raise ConfigError(f"--{name} {text!r} is not name=value")
        if self.advantage_estimator is None and self.advantage_options:
            raise ConfigError("--advantage_options are those of an --advantage_estimator; name one")
        if self.advantage_estimator is not None and self.scale_rewards != "group":
            given = f"--scale_rewards {self.scale_rewards}"
            raise ConfigError(f"{given} and --advantage_estimator both say how advantages are scaled; drop one of them")

    def _check_unread(self) -> None:
        """Raises ConfigError for flags that were changed and that nothing would read."""
        readers = {"sapo_": self.loss_type == "sapo", "vespo_": self.loss_type == "vespo"}
        readers |= {name: self.use_adaptive_entropy for name in ("entropy_target", "entropy_coef_")}
        readers |= {name: self.loss_type != "a2po" for name in ("advantage_estimator", "scale_rewards")}
        unread = tuple(name for name, read in readers.items() if not read)
        for f in fields(self):
            if getattr(self, f.name) == f.default or not f.name.startswith(unread):
                continue
            without = f"--loss_type {self.loss_type}"
            if f.name.startswith("entropy_"):
                without = "no --use_adaptive_entropy"
            raise ConfigError(f"--{f.name} {getattr(self, f.name)} has no meaning with {without}; drop it")

    def _taken(self) -> tuple[str, ...]:
        if self.loss_type in (*CLIPPED, "ppo_two_sided"):
            return ("epsilon", "epsilon_high", "delta")
        if self.loss_type in RANGED:
            return ("epsilon", "epsilon_high")
        return ("epsilon_high",) if self.loss_type == "cispo" else ()

    # -- the objective -------------------------------------------------------------------------------------------------
    @property
    def objective_name(self) -> str:
        return LEVELS[self.importance_sampling_level].get(self.loss_type, self.loss_type)

    @property
    def numbers(self) -> dict[str, Any]:
        """What the flags give the objective, by the names of its own options."""
        made = {"entropy_coef": self.entropy_coef}
        if self.beta and not self.full_kl:  # full is a term of its own
            made |= {"kl_coef": self.beta, "kl": self.estimator}
        made["top_entropy"] = self.top_entropy_quantile
        if self.loss_type in CLIPPED and self.importance_sampling_level == "token":
            made |= {"clip_low": self.clip_low, "clip_high": self.clip_high, "dual_clip": self.delta}
        elif self.loss_type == "cispo":
            made |= {"ratio_max": self.epsilon_high}
        else:
            high = self.epsilon if self.epsilon_high is None else self.epsilon_high
            given = {"clip_low": self.epsilon, "clip_high": high, "delta": self.delta}
            made |= {name: value for name, value in given.items() if value is not None}
        if self.loss_type == "dr_grpo":
            made["max_length"] = self.max_completion_length
        if self.loss_type == "sapo":
            made |= {"temperature_pos": self.sapo_temperature_pos, "temperature_neg": self.sapo_temperature_neg}
        if self.loss_type == "vespo":
            made |= {"k_pos": self.vespo_k_pos, "lambda_pos": self.vespo_lambda_pos}
            made |= {"k_neg": self.vespo_k_neg, "lambda_neg": self.vespo_lambda_neg}
        return made | named_values(self.loss_options)

    @property
    def estimator(self) -> str:
        """Of the KL to the reference."""
        corrected = self.use_bias_correction_kl
        return self.kl_estimator if corrected is None else "is_k3" if corrected else "k3"

    @property
    def clip_low(self) -> float:
        return 0.2 if self.epsilon is None else self.epsilon

    @property
    def clip_high(self) -> float:
        if self.loss_type == "vapo" and self.epsilon is None and self.epsilon_high is None:
            return 0.28  # its own
        return self.clip_low if self.epsilon_high is None else self.epsilon_high

    # -- what it needs -------------------------------------------------------------------------------------------------
    @property
    def needs_reference(self) -> bool:
        return bool(self.beta) or self.loss_type == "a2po"

    @property
    def full_kl(self) -> bool:
        return bool(self.beta) and self.kl_estimator == FULL

    @property
    def reads_ref_logprobs(self) -> bool:
        """Whether the objective reads the reference's log-probs of the sampled tokens."""
        return self.needs_reference and (not self.full_kl or self.loss_type == "a2po")


def named_values(texts: list[str]) -> dict[str, Any]:
    """name=value ... as numbers, truth values and words."""
    made = {}
    for text in texts:
        name, _, value = text.partition("=")
        kinds = ({"true": True, "false": False}.get(value), number(value, int), number(value, float), value)
        made[name] = next(x for x in kinds if x is not None)
    return made
