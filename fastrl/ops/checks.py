"""Everything that can be refused at the door, with the numbers in the message."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from fastrl.ops.head import HeadSpec, accumulation_dtype


def settle_dtypes(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under torch.autocast: both in its dtype, as torch.nn.functional.linear would take them (float64 stays)."""
    for name, x in (("hidden", hidden), ("weight", weight)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    device = hidden.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in (hidden, weight))


def autocast_off(x: Tensor) -> contextlib.AbstractContextManager:
    """Around a backend: dtypes are settled by then, and nothing may be rounded again."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return contextlib.nullcontext()
    return torch.autocast(device, enabled=False)


def check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of a head call. Raises ValueError or TypeError naming both sides."""
    for name, x in (("targets", targets), ("bias", bias)):
        if not isinstance(x, Tensor) and not (name == "bias" and x is None):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} but weight is {list(weight.shape)}; expected [..., H] and [V, H], same H"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets is {list(targets.shape)} but hidden is {list(hidden.shape)}; expected one target per row"
        )
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets must be int32 or int64, got {targets.dtype}; cast it with .long()")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one, or run under torch.autocast"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias is {list(bias.shape)} but weight is {list(weight.shape)}; expected [V={weight.shape[0]}]"
        )
    for name, x in (("weight", weight), ("targets", targets), ("bias", bias)):
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device} but hidden is on {hidden.device}; move one of them")


def check_targets(targets: Tensor, rows: Tensor | None, vocabulary: int, debug_checks: bool) -> None:
    """Targets [N], ignored rows already dropped, and where they stood before (None: nothing was dropped).

    Out of range raises on the CPU (always) and on other devices only with `debug_checks`, which waits for the device;
    without it such a row becomes NaN.
    """
    if targets.numel() == 0 or (targets.device.type != "cpu" and not debug_checks):
        return
    wrong = ((targets < 0) | (targets >= vocabulary)).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        raise ValueError(
            f"targets has {wrong.shape[0]} value(s) outside [0, V={vocabulary}): the first is {int(targets[row])} at "
            f"row {row if rows is None else int(rows[row])}; fix the tokenizer or mark the row with ignore_index"
        )


def check_temperatures(temperature: float | Tensor, rows: Tensor | None) -> None:
    """[N] temperatures must be positive and finite; read on the CPU only, where that waits for nothing."""
    if not isinstance(temperature, Tensor) or temperature.device.type != "cpu":
        return
    wrong = (~((temperature > 0) & temperature.isfinite())).nonzero()
    if wrong.numel():
        at = int(wrong[0])
        row = at if rows is None else int(rows[at])
        raise ValueError(f"temperature must be positive and finite, got {float(temperature[at])} at row {row}")


def head_spec(weight: Tensor, bias, temperature, logit_scale: float, softcap: float | None, hidden: Tensor) -> HeadSpec:
    """Validated HeadSpec; a per-token temperature is flattened to [N] in the accumulation dtype."""
    if isinstance(temperature, Tensor) and temperature.dim() == 0:
        temperature = float(temperature)
    if isinstance(temperature, Tensor):
        if temperature.requires_grad:
            raise ValueError(
                "temperature has requires_grad=True, but no gradient flows to it; pass temperature.detach()"
            )
        if temperature.shape != hidden.shape[:-1]:
            raise ValueError(
                f"temperature is {list(temperature.shape)} but hidden is {list(hidden.shape)}; expected a float or one "
                "per row"
            )
        temperature = temperature.reshape(-1).to(hidden.device, accumulation_dtype(hidden.dtype))
        if not torch.compiler.is_compiling():  # a compiled call reads its numbers inside the operator
            check_temperatures(temperature, None)
    elif not 0 < temperature < math.inf:  # comparisons, which torch.compile can trace of a variable
        raise ValueError(f"temperature must be a positive finite number, got {temperature}; for greedy scores use 1.0")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if not -math.inf < logit_scale < math.inf:
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    return HeadSpec(weight, bias, float(logit_scale), softcap, temperature)
