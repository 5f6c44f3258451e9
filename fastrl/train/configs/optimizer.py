"""Flags of the optimizer: which one, its numbers, where its states live and when the update is applied."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.flags import ConfigError, flag

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
LOW_BITS = ("adamw_torch_8bit", "adamw_torch_4bit")
BITSANDBYTES = ("adamw_bnb_8bit", "paged_adamw_8bit")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", *LOW_BITS, *BITSANDBYTES, "muon", "sgd", "adafactor")
BF16_UPDATES = ("none", "stochastic", "kahan")


@dataclass(kw_only=True)
class OptimizerFlags:
    """Names and defaults are transformers'."""

    title: ClassVar[str] = "optimizer"

    optim: str = flag(
        "adamw_torch",
        "The optimizer. 8bit, 4bit: its states in so many bits (torchao; bnb and paged: bitsandbytes, CUDA only). "
        "muon: for the matrices of the body, AdamW for the rest.",
        choices=OPTIMIZERS,
    )
    learning_rate: float = flag(5e-5, "Peak learning rate.", at_least=0)
    lr_scheduler_type: str = flag("linear", "Shape after the warmup.", choices=SCHEDULES)
    warmup_ratio: float = flag(0.0, "Part of all steps spent warming up.", at_least=0, at_most=1)
    warmup_steps: float = flag(0.0, "Steps spent warming up; below 1, a part of all steps.", at_least=0)
    weight_decay: float = flag(0.0, "Decay of matrices; never of biases and norms.", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW.", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW.", at_least=0, below=1)
    adam_epsilon: float = flag(1e-8, "AdamW.", above=0)
    muon_learning_rate: float | None = flag(
        None, "Peak rate of Muon's matrices; none: learning_rate (its update is scaled to AdamW's size).", at_least=0
    )
    muon_momentum: float = flag(0.95, "Muon.", at_least=0, below=1)
    max_grad_norm: float = flag(1.0, "Clip the global gradient norm to this; 0 turns clipping off.", at_least=0)
    max_skipped_steps: int = flag(3, "Stop after this many steps in a row with a non-finite gradient.", at_least=1)
    optim_offload: bool = flag(False, "Optimizer states live in CPU memory and visit the device (CUDA only).")
    optimizer_in_backward: bool = flag(
        False, "Apply each weight's update in the backward and free its gradient at once; needs max_grad_norm 0 or "
        "clip_two_pass.",
    )  # fmt: skip
    clip_two_pass: bool = flag(
        False, "With optimizer_in_backward: a first backward takes the norm, a second one clips by it; twice the time."
    )
    bf16_update: str = flag(
        "none", "Of --dtype bfloat16 weights: stochastic rounding, or Kahan sums; none loses small updates.",
        choices=BF16_UPDATES,
    )  # fmt: skip

    def _check_optimizer(self) -> None:
        if self.warmup_ratio and self.warmup_steps:
            both = f"--warmup_ratio {self.warmup_ratio} and --warmup_steps {self.warmup_steps:g}"
            raise ConfigError(f"{both} both set the warmup; give one of them")
        if self.lr_scheduler_type == "constant" and (self.warmup_ratio or self.warmup_steps):
            raise ConfigError("--lr_scheduler_type constant has no warmup; use constant_with_warmup or drop the warmup")
        self._check_which()
        self._check_in_backward()
        self._check_bf16_update()

    def _check_which(self) -> None:
        if self.optim != "muon" and (self.muon_learning_rate is not None or self.muon_momentum != 0.95):
            raise ConfigError(f"--muon_learning_rate and --muon_momentum need --optim muon, got {self.optim}")
        if self.muon_learning_rate and not self.learning_rate:
            raise ConfigError("--muon_learning_rate follows the schedule of --learning_rate, which is 0; raise that")
        if self.optim in BITSANDBYTES and self.use_cpu:
            raise ConfigError(f"--optim {self.optim} needs CUDA, got --use_cpu true; use --optim adamw_torch_8bit")
        for package, users in (("torchao", LOW_BITS), ("bitsandbytes", BITSANDBYTES)):
            if self.optim in users and importlib.util.find_spec(package) is None:
                fix = f"pip install {package}"
                raise ConfigError(f"--optim {self.optim} needs {package}, which is not there; {fix}")
        if self.optim_offload and self.cpu_offload:
            raise ConfigError("--cpu_offload true keeps optimizer states in CPU memory already; drop --optim_offload")
        if self.optim_offload and self.optim == "paged_adamw_8bit":
            raise ConfigError("--optim paged_adamw_8bit moves its states by itself; drop --optim_offload")

    def _check_in_backward(self) -> None:
        if not self.optimizer_in_backward:
            if self.clip_two_pass:
                raise ConfigError("--clip_two_pass true needs --optimizer_in_backward true; else one pass is exact")
            return
        if self.max_grad_norm and not self.clip_two_pass:
            raise ConfigError(
                f"--optimizer_in_backward true with --max_grad_norm {self.max_grad_norm:g}: the norm of all gradients "
                "is known only after the backward that applies them; give --max_grad_norm 0, or --clip_two_pass true "
                "(exact, two backwards)"
            )
        if self.clip_two_pass and not self.max_grad_norm:
            raise ConfigError("--clip_two_pass true with --max_grad_norm 0 clips nothing; drop one of them")
        if self.cpu_offload:
            raise ConfigError(
                "--optimizer_in_backward true with --cpu_offload true: gradients may still be on their way to the CPU "
                "when the update reads them; drop one of them"
            )

    def _check_bf16_update(self) -> None:
        if self.bf16_update == "none":
            return
        if self.dtype not in ("bfloat16", "auto"):
            raise ConfigError(
                f"--bf16_update {self.bf16_update} is for bfloat16 weights, got --dtype {self.dtype}, whose weights "
                "lose no update; drop it, or add --dtype bfloat16"
            )
        if self.optim not in ("adamw_torch", *LOW_BITS):
            raise ConfigError(
                f"--bf16_update {self.bf16_update} is an AdamW, got --optim {self.optim}; use adamw_torch, "
                "adamw_torch_8bit or adamw_torch_4bit"
            )
