"""Flags of stages that sample completions of a prompt in groups: GRPO, RLOO."""

from __future__ import annotations

from dataclasses import dataclass

from fastrl.train.configs.base import TrainConfig
from fastrl.train.flags import ConfigError, flag

MODES = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(kw_only=True)
class OnlineConfig(TrainConfig):
    """Sampling and rewards, and how many optimizer steps a sampled batch makes."""

    learning_rate: float = flag(1e-6, "Peak learning rate.", at_least=0)

    # sampling
    num_generations: int = flag(8, "Completions of each prompt (the group).", at_least=2)
    num_generations_eval: int = flag(1, "Completions of each held-out prompt (TRL: num_generations).", at_least=1)
    max_completion_length: int = flag(512, "Most new tokens of a completion.", at_least=1)
    max_prompt_length: int | None = flag(
        None, "Longer prompts are dropped and counted. none: what the model's context leaves.", at_least=1
    )
    temperature: float = flag(1.0, "Of sampling, and of the log-probs that are trained.", above=0)
    eval_temperature: float | None = flag(
        None, "Of sampling held-out prompts; 0 is greedy, none is temperature.", at_least=0
    )
    top_p: float = flag(1.0, "Nucleus sampling.", above=0, at_most=1)
    top_k: int = flag(0, "Sample among the k likeliest; 0 is all.", at_least=0)
    steps_per_generation: int | None = flag(
        None, "Batches of per_device_train_batch_size sampled at once; none: gradient_accumulation_steps.", at_least=1
    )
    num_iterations: int = flag(1, "Times each sampled batch is trained on.", at_least=1)

    # reward
    reward_funcs: list[str] = flag([], "Rewards: built-in names, dotted.path, or file.py:name.")
    reward_weights: list[float] | None = flag(None, "One weight a reward; none means 1 each.")

    # samples of another policy
    importance_sampling_mode: str = flag(
        "none", "Weights trained / sampled policy, by the sampler's own log-probs of what it drew.", choices=MODES
    )
    importance_sampling_clip_max: float = flag(3.0, "Largest weight.", above=0)
    importance_sampling_clip_min: float | None = flag(None, "Smallest weight; none: 0.", above=0)

    # training
    mask_truncated_completions: bool = flag(False, "Do not train completions that were cut at the length limit.")
    disable_dropout: bool = flag(True, "Dropout off (TRL: false), so that the first step's ratio is exactly 1.")

    def __post_init__(self):
        if isinstance(self.reward_funcs, str):
            self.reward_funcs = [self.reward_funcs]
        super().__post_init__()

    def _check(self) -> None:
        super()._check()
        if not self.reward_funcs:
            raise ConfigError("--reward_funcs is required; give built-in names, dotted.path or file.py:name")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            n, m = len(self.reward_weights), len(self.reward_funcs)
            raise ConfigError(f"--reward_weights has {n} numbers for {m} reward_funcs; give one for each")
        self._check_groups()
        if self.top_p < 1 or self.top_k > 0:
            # log pi over the kept tokens is not log pi over the vocabulary: every ratio is off by log(kept mass).
            raise ConfigError(
                f"--top_p {self.top_p:g} --top_k {self.top_k}: training needs samples of the whole distribution "
                "(a cut one biases every ratio); use --top_p 1 --top_k 0 and shape it with --temperature"
            )

    def _check_groups(self) -> None:
        g, a = self.num_generations, self.gradient_accumulation_steps
        shown = f"{self.per_device_train_batch_size} x {a}"
        if self.batch_size % g:
            fix = f"make their product a multiple of {g}, such as {max(1, round(self.batch_size / g)) * g}"
            raise ConfigError(
                f"--per_device_train_batch_size x --gradient_accumulation_steps = {shown} completions a step is not "
                f"a whole number of groups of --num_generations {g}; {fix}"
            )
        if self.steps_per_generation is None:
            self.steps_per_generation = a
        if self.steps_per_generation % a:
            raise ConfigError(
                f"--steps_per_generation {self.steps_per_generation} must be a multiple of "
                f"--gradient_accumulation_steps {a}, so that what is sampled fills whole optimizer steps"
            )

    @property
    def prompts_per_step(self) -> int:
        """Prompts whose completions make one optimizer step."""
        return self.batch_size // self.num_generations

    @property
    def completions_per_generation(self) -> int:
        """Completions sampled at once."""
        return self.per_device_train_batch_size * self.steps_per_generation

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps between two samplings."""
        return self.steps_per_generation // self.gradient_accumulation_steps * self.num_iterations
