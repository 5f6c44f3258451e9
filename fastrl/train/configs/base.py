"""Flags that stages share: TrainConfig, those of all; DatasetConfig, of those whose responses are in the dataset."""

from __future__ import annotations

import dataclasses
import importlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from fastrl.train.configs.activations import ActivationFlags
from fastrl.train.configs.adapters import AdapterFlags
from fastrl.train.configs.optimizer import OptimizerFlags
from fastrl.train.configs.parallel import ParallelFlags
from fastrl.train.flags import ConfigError, check_fields, flag

INTERVALS = ("no", "steps", "epoch")
DTYPES = ("auto", "float32", "bfloat16", "float64")
TRACKERS = ("none", "all", "tensorboard", "wandb")


@dataclass(kw_only=True)
class TrainConfig(ParallelFlags, ActivationFlags, AdapterFlags, OptimizerFlags):
    """Flags of every stage. Raises ConfigError (a ValueError) from its constructor."""

    stage: ClassVar[str] = ""
    unit: ClassVar[str] = "sequences"  # what per_device_train_batch_size counts

    # model
    model_name_or_path: str = flag("", "Directory (or hub name) of a transformers causal LM and its tokenizer.")
    model_revision: str = flag("main", "Branch, tag or commit when the model is a hub name.")
    dtype: str = flag("float32", "Type of the weights; float32 keeps master weights (see bf16).", choices=DTYPES)
    bf16: bool | None = flag(None, "Compute in bfloat16 over the weights. none: on CUDA yes, on the CPU no.")
    attn_implementation: str | None = flag(None, "Attention; none picks the fastest packed one that is installed.")
    use_cpu: bool = flag(False, "Train on the CPU even if an accelerator is there.")

    # data
    dataset_name: str = flag("", "JSONL or parquet file, a directory of them, or a name `datasets` can load.")
    dataset_config: str | None = flag(None, "Configuration of a hub dataset.")
    dataset_train_split: str = flag("train", "Split to train on.")
    dataset_test_split: str = flag("test", "Held-out split to evaluate on (used unless eval_strategy is no).")

    max_dropped_fraction: float = flag(
        0.5, "Stop when more than this part of the rows does not fit.", at_least=0, at_most=1
    )

    # where and when
    output_dir: str = flag("", "The model, metrics.jsonl, plots/ and checkpoint-N/ go here.")
    overwrite_output_dir: bool = flag(False, "Delete the run that is already in output_dir and start again.")
    resume_from_checkpoint: str | bool | None = flag(
        None, "A checkpoint directory, or auto (or true): the newest complete one in output_dir, if there is one."
    )
    num_train_epochs: float = flag(3.0, "Passes over the training data.", above=0)
    max_steps: int = flag(-1, "Optimizer steps; overrides num_train_epochs when positive.", at_least=-1)
    seed: int = flag(42, "Seed of initialisation, data order and sampling.", at_least=0)
    logging_steps: float = flag(10.0, "Steps between records; below 1, a part of all steps.", above=0)
    logging_first_step: bool = flag(True, "Also record step 1 (transformers: false): it shows a wrong setup at once.")
    eval_strategy: str = flag("no", "When to evaluate on the held-out split.", choices=INTERVALS)
    eval_steps: float | None = flag(None, "Steps between evaluations; none means logging_steps.", above=0)
    eval_on_start: bool = flag(False, "Evaluate once before the first step.")
    save_strategy: str = flag("steps", "When to write checkpoint-N/.", choices=INTERVALS)
    save_steps: float = flag(500.0, "Steps between checkpoints; below 1, a part of all steps.", above=0)
    save_total_limit: int | None = flag(None, "Keep this many newest checkpoints; none keeps all.", at_least=1)
    report_to: list[str] = flag(["none"], "Trackers beside metrics.jsonl, which is always written.", choices=TRACKERS)
    run_name: str | None = flag(None, "Name of the run in the trackers; none means output_dir.")

    # batch
    per_device_train_batch_size: int = flag(8, "Sequences (pairs, completions) of a batch.", at_least=1)
    gradient_accumulation_steps: int = flag(
        1, "Batches of per_device_train_batch_size in one optimizer step, normalised together.", at_least=1
    )
    per_device_eval_batch_size: int = flag(
        8, "Without effect: max_tokens_per_device cuts evaluation too, and no result depends on it.", at_least=1
    )
    max_tokens_per_device: int = flag(
        8192,
        "Tokens packed into one micro-batch. Changes memory, never results; a longer sequence goes alone.",
        at_least=1,
    )

    share_prompts: bool = flag(True, "Completions of one prompt, and both sides of a pair, share one copy of it.")
    probe_memory: bool | None = flag(
        None, "Run the worst-case micro-batch before step 1, so that memory runs out then. none: on CUDA yes."
    )
    debug_checks: bool = flag(False, "Check targets, log-probs and gradients on the host at every micro-batch; slow.")

    def __post_init__(self):
        if isinstance(self.resume_from_checkpoint, bool) or self.resume_from_checkpoint in ("auto", "true", "True"):
            self.resume_from_checkpoint = "auto" if self.resume_from_checkpoint else None
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        self.report_to = self.report_to or ["none"]
        check_fields(self)
        self._check()

    def _check(self) -> None:
        for name in ("model_name_or_path", "dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is required; {self.__dataclass_fields__[name].metadata['help']}")
        self._check_parallel()
        self._check_activations()
        self._check_optimizer()
        self._check_adapters()
        combinations().check(self)
        if self.max_steps == 0:
            raise ConfigError("--max_steps is 0, so nothing would train; give a positive number, or -1 for epochs")
        if len(self.report_to) > 1 and "none" in self.report_to:
            raise ConfigError(f"--report_to {' '.join(self.report_to)}: none excludes the others; drop it or them")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            fix = "add --eval_strategy steps or drop --eval_steps"
            raise ConfigError(f"--eval_steps {self.eval_steps:g} with --eval_strategy {self.eval_strategy}: {fix}")
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise ConfigError("--resume_from_checkpoint and --overwrite_output_dir contradict each other; give one")

    # -- derived numbers -------------------------------------------------------------------------------------------
    @property
    def batch_size(self) -> int:
        """Sequences (pairs, completions) of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else max(1, math.ceil(self.num_train_epochs * steps_per_epoch))

    def every(self, name: str, total_steps: int) -> int:
        """logging_steps, eval_steps or save_steps as a whole number of steps (a fraction is of total_steps)."""
        value = getattr(self, name)
        value = self.logging_steps if value is None else value
        return max(1, math.ceil(value * total_steps) if value < 1 else int(value))

    def is_due(self, what: str, step: int, total_steps: int, steps_per_epoch: float = math.inf) -> bool:
        """Is it time to do `what` (logging, eval, save) after `step` steps are done? The last step is always due."""
        strategy = "steps" if what == "logging" else getattr(self, f"{what}_strategy")
        if strategy == "no" or step == 0:
            return False
        if step == total_steps or (what == "logging" and step == 1 and self.logging_first_step):
            return True
        if strategy == "epoch":
            return math.floor(step / steps_per_epoch) > math.floor((step - 1) / steps_per_epoch)
        return step % self.every(f"{what}_steps", total_steps) == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values by flag name; `type(config)(**config.to_dict())` gives the same config back."""
        return dataclasses.asdict(self)


def combinations():
    """fastrl.train.combinations, which is also a program of its own."""
    return importlib.import_module("fastrl.train.combinations")


@dataclass(kw_only=True)
class DatasetConfig(TrainConfig):
    """Stages whose responses come from the dataset."""

    max_length: int | None = flag(
        1024, "Longest sequence (prompt + completion); none: the model's context. See truncation.", at_least=2
    )
    truncation: str = flag(
        "drop",
        "Longer sequences: drop leaves them out, counted and listed (TRL cuts silently); keep_start cuts their end.",
        choices=("drop", "keep_start"),
    )
