"""Flags of what a forward keeps for the backward, and of compiled or low-precision layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.flags import ConfigError, flag

POLICIES = ("full", "selective")
RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


@dataclass(kw_only=True)
class ActivationFlags:
    """Less memory for more time, and the other way round."""

    title: ClassVar[str] = "activations and precision of the layers"

    gradient_checkpointing: bool = flag(True, "Recompute each layer in the backward pass: less memory, more time.")
    gradient_checkpointing_policy: str = flag(
        "full", "full keeps each layer's input; selective also attention and half of the products.", choices=POLICIES
    )
    activation_offloading: bool = flag(
        False, "Move what checkpointing keeps to pinned CPU memory until the backward (CUDA only)."
    )
    tiled_mlp: int | str = flag(
        0, "Run each MLP in this many tiles of tokens, recomputed in the backward; auto: of 2048 tokens; 0: whole."
    )
    torch_compile: bool = flag(False, "Compile the layers of the body.")
    fp8: str | None = flag(
        None, "Linear layers of the body multiply in float8 (torchao, compute capability 8.9 and up).", choices=RECIPES
    )
    fp32_modules: list[str] = flag(
        [], "Under --bf16: modules that compute in float32, by the ends of their names (*norm, mlp.gate)."
    )

    def _check_activations(self) -> None:
        if self.tiled_mlp != "auto" and (isinstance(self.tiled_mlp, str) or self.tiled_mlp < 0):
            raise ConfigError(f"--tiled_mlp must be auto or a number from 0 on, got {self.tiled_mlp!r}")
        if not self.gradient_checkpointing:
            for name, off in (("gradient_checkpointing_policy", "full"), ("activation_offloading", False)):
                if getattr(self, name) != off:
                    raise ConfigError(f"--{name} {getattr(self, name)} needs --gradient_checkpointing true")
        if self.torch_compile and self.gradient_checkpointing_policy == "selective":
            raise ConfigError(
                "--gradient_checkpointing_policy selective picks among single operations, and --torch_compile true "
                "leaves none to pick from; use full with it"
            )
        if self.fp8 and self.use_peft:
            raise ConfigError(f"--fp8 {self.fp8} converts layers that are trained; --use_peft true freezes them")
        self._check_fp32_modules()

    def _check_fp32_modules(self) -> None:
        if not self.fp32_modules:
            return
        if self.dtype in ("bfloat16", "float64"):
            raise ConfigError(f"--fp32_modules needs --dtype float32 (with --bf16 true), got --dtype {self.dtype}")
        if self.bf16 is False:
            raise ConfigError("--fp32_modules has nothing to do with --bf16 false: everything computes in float32")
