"""Optimizer state by parameter name: to tensors and JSON, and back bitwise, or a list of why not.

A parameter that is split over ranks has its states split alike, by rows. Each rank writes the rows it holds, and reads
the rows it needs from whichever files they lie in: what n processes wrote, m can read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

META = "fastrl"  # in a file's metadata: the layout of its tensors, as JSON


@dataclass
class Packed:
    """tensors: {"exp_avg/layer.weight": ...} on the CPU, the rows of them that this rank holds. plain: JSON, the same
    on every rank: class, parameters, scalars, group settings. layout: JSON: which rows of each parameter these are,
    and which of the tensors have rows."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=lambda: {"rows": {}, "split": []})

    @property
    def metadata(self) -> dict[str, str]:
        return {META: json.dumps(self.layout)}


# -- out ---------------------------------------------------------------------------------------------------------------
def pack_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]], first: bool = True
) -> Packed:
    """What `unpack_optimizer` needs. first: of the ranks that write; it alone gives what is not split.

    Raises: ValueError if the optimizer holds a parameter that has no name, or a state that is split otherwise.
    """
    names, made, groups = {id(p): name for name, p in named_parameters}, Packed(), []
    parameters, scalars = {}, {}
    for group in optimizer.param_groups:
        members = []
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(f"the optimizer holds a {list(p.shape)} parameter that named_parameters lacks")
            name = names[id(p)]
            members.append(name)
            parameters[name], mine = _describe(p), first or isinstance(p, DTensor)
            made.layout["rows"][name] = list(rows_of(p)) if mine else [0, 0]
            for kind, value in optimizer.state.get(p, {}).items() if mine else ():
                key = f"{kind}/{name}"
                if isinstance(value, Tensor):
                    made.tensors[key] = local(value).detach().cpu().contiguous()
                    if has_rows(optimizer, kind, name, p, value):
                        made.layout["split"].append(key)
                elif value is not None:
                    scalars[key] = value
        settings = {k: v for k, v in group.items() if isinstance(v, (int, float, str, bool, list, tuple))}
        groups.append({**{k: v for k, v in settings.items() if k != "params"}, "members": members})
    made.plain = {
        "class": type(optimizer).__name__,
        "parameters": parameters,
        "scalars": scalars,
        "groups": groups,
    }
    return made


def has_rows(optimizer: torch.optim.Optimizer, kind: str, name: str, p: Tensor, value: Tensor) -> bool:
    """Whether a state has a row for each of its parameter's, so that it can be cut where that is."""
    if isinstance(value, DTensor):
        return any(isinstance(x, Shard) for x in value.placements)
    alike = value.dim() > 0 and (value.shape == p.shape or kind in getattr(optimizer, "row_states", ()))
    if isinstance(p, DTensor) and value.dim() > 0 and not alike and value.shape == local(p).shape:
        raise ValueError(f"the state {kind} of {name} is a plain tensor of this rank's rows; it has to be a DTensor")
    return alike


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def rows_of(p: Tensor) -> tuple[int, int]:
    """[start, stop) of the leading dimension that this rank holds; FSDP2 cuts it as torch.chunk does."""
    count = p.shape[0] if p.dim() else 1
    if not isinstance(p, DTensor):
        return 0, count
    mesh, last = p.device_mesh, p.device_mesh.ndim - 1
    step = -(-count // mesh.size(last))
    start = min(mesh.get_local_rank(last) * step, count)
    stop = min(start + step, count)
    if p.placements[last] != Shard(0) or local(p).shape[0] != stop - start:
        raise ValueError(f"a parameter of {list(p.shape)} is split as {p.placements}; only even rows can be saved")
    return start, stop


# -- the files ---------------------------------------------------------------------------------------------------------
class StateFiles:
    """Optimizer states as they lie in files, each of which has the rows of every parameter that one rank held.

    parameters: name -> {"shape": ..., "dtype": ...} of the whole parameters.
    """

    def __init__(self, paths: Sequence[Path], parameters: dict[str, dict[str, Any]]):
        self.files = [safe_open(path, "pt") for path in paths]
        self.layouts = [json.loads((f.metadata() or {}).get(META, "{}")) for f in self.files]
        self.shapes = {name: described["shape"] for name, described in parameters.items()}
        self.holders: dict[str, list[int]] = {}  # key -> numbers of the files that have it
        for at, file in enumerate(self.files):
            for key in file.keys():
                self.holders.setdefault(key, []).append(at)
        self.split = {key for layout in self.layouts for key in layout.get("split", ())}

    def states(self) -> list[tuple[str, str]]:
        """(kind, name of the parameter) of every state."""
        return [(kind, name) for kind, _, name in (key.partition("/") for key in self.holders)]

    def read(self, kind: str, name: str, start: int, stop: int) -> tuple[Tensor, bool]:
        """(the rows [start, stop) of a state, True), or (all of a state that has no rows, False)."""
        key = f"{kind}/{name}"
        if not self._has_rows(key, name):
            return self.files[self.holders[key][0]].get_tensor(key), False
        pieces = []
        for a, b, at in sorted((*self._rows(at, name), at) for at in self.holders[key]):
            first, last = max(a, start), min(b, stop)
            if (first, last) == (a, b):
                pieces.append(self.files[at].get_tensor(key))
            elif first < last:
                pieces.append(self.files[at].get_slice(key)[first - a : last - a])
        if not pieces:
            return self.files[self.holders[key][0]].get_tensor(key)[:0], True
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces), True

    def _has_rows(self, key: str, name: str) -> bool:
        at = self.holders[key][0]
        if "split" in self.layouts[at]:
            return key in self.split
        shape = self.shapes[name]  # a file without a layout holds all of everything
        return bool(shape) and list(self.files[at].get_slice(key).get_shape()) == shape

    def _rows(self, at: int, name: str) -> tuple[int, int]:
        """Those that file number `at` has of a parameter."""
        return tuple(self.layouts[at].get("rows", {}).get(name, (0, self.shapes[name][0])))


# -- in ----------------------------------------------------------------------------------------------------------------
def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    files: StateFiles,
    plain: dict[str, Any],
) -> list[str]:
    """Fill `optimizer.state`; returns what does not fit (then nothing was changed).

    Group settings (learning rate, betas, decay) stay those of the new config: the schedule is a function of the step.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = {name: p for name, p in named_parameters if id(p) in held}
    problems = _mismatches(type(optimizer).__name__, parameters, plain)
    loose = [key for key in [*files.holders, *plain["scalars"]] if key.partition("/")[2] not in parameters]
    problems = problems or [f"state {key} belongs to no parameter" for key in loose]
    if problems:
        return problems
    on_device = {id(p): _steps_on_device(group) for group in optimizer.param_groups for p in group["params"]}
    on_host = getattr(optimizer, "states_on_host", False)
    optimizer.state.clear()
    for kind, name in files.states():
        p = parameters[name]
        value, split = files.read(kind, name, *rows_of(p))
        if value.dim() > 0 and not on_host or value.dim() == 0 and on_device[id(p)]:
            value = value.to(local(p).device)  # a 0-dim step count lives on the CPU unless the optimizer is fused
        optimizer.state[p][kind] = as_split(p, value) if split else value
    for key, value in plain["scalars"].items():
        kind, _, name = key.partition("/")
        optimizer.state[parameters[name]][kind] = value
    return []


def as_split(p: Tensor, rows: Tensor) -> Tensor:
    """A state of this rank's rows of p, as the DTensor that p is; `rows` themselves where p is whole."""
    if not isinstance(p, DTensor):
        return rows
    shape = torch.Size((p.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    made = DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)
    return made if local(made).device == rows.device else made.to(rows.device)  # weights that live in CPU memory


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
