"""Optimizer state by parameter name: to tensors and JSON, and back bitwise, or a list of why not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def pack_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({"exp_avg/layer.weight": tensor, ...} on the CPU, JSON: class, parameters, scalars, group settings).

    Raises: ValueError if the optimizer holds a parameter that has no name.
    """
    names = {id(p): name for name, p in named_parameters}
    tensors, scalars, parameters, groups = {}, {}, {}, []
    for group in optimizer.param_groups:
        members = []
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(f"the optimizer holds a {list(p.shape)} parameter that named_parameters lacks")
            name = names[id(p)]
            members.append(name)
            parameters[name] = _describe(p)
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
                elif value is not None:
                    scalars[f"{key}/{name}"] = value
        settings = {k: v for k, v in group.items() if isinstance(v, (int, float, str, bool, list, tuple))}
        groups.append({**{k: v for k, v in settings.items() if k != "params"}, "members": members})
    plain = {"class": type(optimizer).__name__, "parameters": parameters, "scalars": scalars, "groups": groups}
    return tensors, plain


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    tensors: dict[str, Tensor],
    plain: dict[str, Any],
) -> list[str]:
    """Fill `optimizer.state`; returns what does not fit (then nothing was changed).

    Group settings (learning rate, betas, decay) stay those of the new config: the schedule is a function of the step.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in named_parameters if id(p) in held}
    problems = _mismatches(type(optimizer).__name__, parameters, plain)
    loose = [key for key in [*tensors, *plain["scalars"]] if key.partition("/")[2] not in parameters]
    problems += [f"state {key} belongs to no parameter" for key in loose if not problems]
    if problems:
        return problems
    on_device = {id(p): _steps_on_device(group) for group in optimizer.param_groups for p in group["params"]}
    optimizer.state.clear()
    for key, value in [*tensors.items(), *plain["scalars"].items()]:
        kind, _, name = key.partition("/")
        p = parameters[name]
        if isinstance(value, Tensor) and (value.dim() > 0 or on_device[id(p)]):
            value = value.to(p.device)  # a 0-dim step count lives on the CPU unless the optimizer is fused
        optimizer.state[p][kind] = value
    return []


def _mismatches(kind: str, parameters: dict[str, torch.nn.Parameter], plain: dict[str, Any]) -> list[str]:
    if plain["class"] != kind:
        return [f"the optimizer was {plain['class']}, now it is {kind}"]
    saved, problems = plain["parameters"], []
    problems += [f"{n} is in the checkpoint but not trained now" for n in saved if n not in parameters]
    problems += [f"{n} is trained now but not in the checkpoint" for n in parameters if n not in saved]
    for name in saved:
        if name in parameters and _describe(parameters[name]) != saved[name]:
            problems.append(f"{name} was {_shown(saved[name])}, now it is {_shown(_describe(parameters[name]))}")
    return problems


def _describe(p: Tensor) -> dict[str, Any]:
    return {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch.")}


def _shown(described: dict[str, Any]) -> str:
    return f"{described['dtype']} {described['shape']}"


def _steps_on_device(group: dict[str, Any]) -> bool:
    return bool(group.get("fused") or group.get("capturable"))
