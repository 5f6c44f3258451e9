"""What each switch would save, and which of them a device needs: each is tried on the model of the run's memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fastrl.train.flags import ConfigError
from fastrl.train.plan.estimate import MemoryModel
from fastrl.train.plan.skeleton import changed


@dataclass(frozen=True)
class Switch:
    """flags: to add. price: what it costs, in words. Listed from the cheapest to the dearest."""

    flags: dict[str, Any]
    price: str
    gpu_only: bool = False

    @property
    def text(self) -> str:
        return " ".join(f"--{name} {shown(value)}" for name, value in self.flags.items())


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


SWITCHES = (
    Switch({"precompute_ref_log_probs": True}, "no time: the reference runs once"),
    Switch({"optim": "adamw_torch_8bit"}, "little time; states in 8 bits"),
    Switch({"gradient_checkpointing": True, "gradient_checkpointing_policy": "selective"}, "recomputes the cheap part"),
    Switch({"gradient_checkpointing": True, "gradient_checkpointing_policy": "full"}, "a second forward"),
    Switch({"tiled_mlp": 8}, "recomputes the MLPs"),
    Switch({"activation_offloading": True}, "transfers beside the work", gpu_only=True),
    Switch({"optimizer_in_backward": True, "max_grad_norm": 0.0}, "no time; no clipping"),
    Switch({"optim": "adamw_torch_4bit"}, "little time; states in 4 bits"),
    Switch({"dtype": "bfloat16", "bf16_update": "kahan"}, "no time; weights in bfloat16"),
    Switch({"optim_offload": True}, "the update waits for transfers", gpu_only=True),
    Switch({"use_peft": True}, "no time; trains adapters, not the model"),
    Switch({"use_peft": True, "load_in_4bit": True}, "dequantises; adapters on 4-bit weights", gpu_only=True),
)
RANKS = (2, 4, 8)


@dataclass(frozen=True)
class Trial:
    """One change. total: bytes of the largest phase with it. saves: of the total. most_tokens: that then fit."""

    flags: dict[str, Any]
    price: str
    total: int
    saves: int
    most_tokens: int


def with_flags(model: MemoryModel, **flags: Any) -> MemoryModel | None:
    """The same run with other flags; None where they change nothing or are refused."""
    if not any(n in model.config.__dataclass_fields__ for n in flags):
        return None
    try:
        config = changed(model.config, **flags)
    except ConfigError:
        return None
    if config == model.config:
        return None
    return dataclasses.replace(model, config=config, notes=[])


def candidates(model: MemoryModel) -> list[tuple[Switch, MemoryModel]]:
    found = []
    for switch in SWITCHES:
        if switch.gpu_only and model.device.kind == "cpu":
            continue
        if not set(switch.flags) <= set(model.config.__dataclass_fields__):
            continue
        if any(name == "precompute_ref_log_probs" for name in switch.flags) and "reference" not in model.weights:
            continue
        if (other := with_flags(model, **switch.flags)) is not None:
            found.append((switch, other))
    return found


def tried(model: MemoryModel) -> list[Trial]:
    """Every switch by itself, the one that saves most first; those that save nothing are left out."""
    now = model.estimate().total
    made = []
    for switch, other in candidates(model):
        total = other.estimate().total
        made.append(Trial(switch.flags, switch.price, total, now - total, other.most_tokens()))
    for ranks in RANKS:
        if ranks > model.ranks:
            other = dataclasses.replace(model, ranks=ranks, notes=[])
            total = other.estimate().total
            made.append(Trial({"num_processes": ranks}, "more devices", total, now - total, other.most_tokens()))
    return sorted((t for t in made if t.saves > 0.005 * now), key=lambda t: -t.saves)


@dataclass(frozen=True)
class Fit:
    """flags: to add so that the run fits; None if no set of switches does. total: of the run with them."""

    flags: dict[str, Any] | None
    total: int


def fit(model: MemoryModel) -> Fit:
    """The cheapest switches that make the run fit: added in the order of their price, then those that were not needed
    are taken back, the dearest first. A micro-batch is cut before any of them where it is longer than it has to be."""
    steps: list[dict[str, Any]] = []
    now = model
    smaller = max(model.shape.longest, 4096)
    asked = [Switch({"max_tokens_per_device": smaller}, "")] if smaller < model.shape.tokens else []
    for switch in (*asked, *SWITCHES):
        if now.fits():
            break
        usable = not (switch.gpu_only and model.device.kind == "cpu")
        other = with_flags(now, **switch.flags) if usable else None
        if other is not None and _reshaped(other).estimate().total < 0.995 * now.estimate().total:
            steps.append(switch.flags)
            now = _reshaped(other)
    if not now.fits():
        return Fit(None, now.estimate().total)
    for unneeded in reversed(steps[:-1]):
        rest = [s for s in steps if s is not unneeded]
        other = with_flags(model, **_joined(rest))
        if other is not None and _reshaped(other).fits():
            steps, now = rest, _reshaped(other)
    return Fit(_joined(steps), now.estimate().total)


def _joined(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for step in steps for name, value in step.items()}


def _reshaped(model: MemoryModel) -> MemoryModel:
    """With the tokens of its own flags: max_tokens_per_device may be one of the changes."""
    tokens = min(model.shape.tokens, max(model.config.max_tokens_per_device, model.shape.longest))
    return dataclasses.replace(model, shape=dataclasses.replace(model.shape, tokens=tokens), notes=[])
