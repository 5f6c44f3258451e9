"""Flags of adapters (peft) and quantised base weights (bitsandbytes), by TRL's names."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.flags import ConfigError, flag

QUANT_TYPES = ("nf4", "fp4")
STORAGES = ("uint8", "int8", "float16", "bfloat16", "float32", "float64")
# flag -> the flag that must be on for anything to read it
READ_WITH = {
    **dict.fromkeys(
        (
            "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters",
            "lora_modules_to_save", "use_rslora", "use_dora", "load_in_4bit", "load_in_8bit", "merge_adapters",
        ),
        "use_peft",
    ),
    **dict.fromkeys(("bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"), "load_in_4bit"),
}  # fmt: skip


@dataclass(kw_only=True)
class AdapterFlags:
    """LoRA and its kin; the base stays frozen and is also the reference."""

    title: ClassVar[str] = "adapters and quantised weights"

    use_peft: bool = flag(False, "Train adapters on the frozen model.")
    lora_r: int = flag(16, "Rank.", at_least=1)
    lora_alpha: int = flag(32, "Scale: alpha / r (alpha / sqrt(r) with use_rslora).", at_least=1)
    lora_dropout: float = flag(0.05, "On the adapters' input; none where disable_dropout is on.", at_least=0, below=1)
    lora_target_modules: list[str] | None = flag(
        None, "Modules that get adapters, or one regular expression; none: all-linear (TRL: peft's shorter list)."
    )
    lora_target_parameters: list[str] | None = flag(None, "Bare parameters that get them, such as those of experts.")
    lora_modules_to_save: list[str] | None = flag(None, "Modules trained whole beside the adapters.")
    use_rslora: bool = flag(False, "Rank-stabilised scale (Kalajdzievski 2023).")
    use_dora: bool = flag(False, "Weight-decomposed adapters (Liu et al. 2024).")
    merge_adapters: bool = flag(False, "At the end, also write the merged model to output_dir/merged.")
    load_in_4bit: bool = flag(False, "Base weights in 4 bits (bitsandbytes); needs use_peft.")
    load_in_8bit: bool = flag(False, "Base weights in 8 bits (bitsandbytes); needs use_peft.")
    bnb_4bit_quant_type: str = flag("nf4", "4-bit format.", choices=QUANT_TYPES)
    use_bnb_nested_quant: bool = flag(False, "Quantise the quantisation constants too.")
    bnb_4bit_quant_storage: str | None = flag(None, "Type that holds the packed values; none: uint8.", choices=STORAGES)

    def _check_adapters(self) -> None:
        for name, switch in READ_WITH.items():
            value = getattr(self, name)
            if value != self.__dataclass_fields__[name].default and not getattr(self, switch):
                shown = str(value).lower() if isinstance(value, bool) else value
                raise ConfigError(f"--{name} {shown} needs --{switch} true; add it, or drop this")
        if self.load_in_4bit and self.load_in_8bit:
            raise ConfigError("--load_in_4bit and --load_in_8bit contradict each other; give one")
        if self.use_peft:
            require("peft", "use_peft")
            self._check_beside_adapters()
        if self.quantised is not None:
            require("bitsandbytes", self.quantised)
            self._check_beside_quantised()

    def _check_beside_adapters(self) -> None:
        if getattr(self, "sync_ref_model", False):
            raise ConfigError(
                "--sync_ref_model moves a reference model, and with --use_peft the reference is the base under the "
                "adapters, which stays; drop one of them"
            )

    def _check_beside_quantised(self) -> None:
        name = self.quantised
        if getattr(self, "fp8", False):
            raise ConfigError(f"--{name} and --fp8 both say how the body's linear layers compute; drop one of them")
        if getattr(self, "dtype", "") == "float64":
            raise ConfigError(f"--{name} computes in at most float32; use --dtype float32 or bfloat16")
        if getattr(self, "cpu_offload", False):
            raise ConfigError(f"--cpu_offload moves sharded weights, and those of --{name} are whole; drop one of them")

    @property
    def quantised(self) -> str | None:
        """The flag that asks for quantised weights."""
        return "load_in_4bit" if self.load_in_4bit else "load_in_8bit" if self.load_in_8bit else None


def require(package: str, name: str) -> None:
    """Raises ConfigError where a flag needs a package that is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"--{name} true needs {package}, which is not installed: pip install {package}")
