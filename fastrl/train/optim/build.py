"""The optimizer that --optim names, over the trainable parameters of a model; what cannot be is refused here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastrl.train.config import TrainConfig
from fastrl.train.flags import ConfigError
from fastrl.train.optim.codecs import torchao
from fastrl.train.optim.groups import Groups, groups_of, muon_names
from fastrl.train.optim.muon import SCALE, MuonAdamW, RowMuon
from fastrl.train.optim.norm import split_over
from fastrl.train.optim.sliced import BY_STATES, Kept

FUSED = ("cuda", "cpu", "mps", "xpu")  # devices for which torch has a fused AdamW


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """--optim over the trainable parameters of `model`, matrices with weight decay and the rest without.

    Raises: ValueError if nothing is trainable; ConfigError for what this model, device or number of ranks rules out.
    """
    groups = groups_of(model, config.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    _refuse(config, parameters)
    if config.bf16_update != "none" or config.optim in STATES:
        return sliced(groups, config)
    if config.optim == "muon":
        names = muon_names(model)
        return muon(groups, config, {id(p) for n, p in model.named_parameters() if n in names})
    return MAKERS[config.optim](groups, config)


def adam_numbers(config: TrainConfig) -> dict[str, Any]:
    betas = (config.adam_beta1, config.adam_beta2)
    return {"lr": config.learning_rate, "betas": betas, "eps": config.adam_epsilon}


def adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **adam_numbers(config), fused=devices(groups) == {"cuda"} or None)


def fused(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **adam_numbers(config), fused=devices(groups) <= set(FUSED) or None)


def devices(groups: Groups) -> set[str]:
    return {p.device.type for group in groups for p in group["params"]}


STATES = {"adamw_torch_8bit": "8bit", "adamw_torch_4bit": "4bit"}


def sliced(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """States of few bits, or bfloat16 weights that lose no update, or both."""
    states = STATES.get(config.optim, "bfloat16")
    if config.optim in STATES:
        torchao()
    weights = "nearest" if config.bf16_update == "none" else config.bf16_update
    return BY_STATES[states](groups, Kept(states, weights, config.seed), **adam_numbers(config))


def muon(groups: Groups, config: TrainConfig, matrices: set[int]) -> torch.optim.Optimizer:
    """Muon for the parameters with these ids. Raises ConfigError if there is none."""
    theirs, rest = [], []
    for group in groups:
        for into, wanted in ((theirs, True), (rest, False)):
            if some := [p for p in group["params"] if (id(p) in matrices) == wanted]:
                into.append({**group, "params": some})
    if not theirs:
        raise ConfigError("--optim muon: no weight of a linear layer is trained; use --optim adamw_torch")
    rate = config.learning_rate if config.muon_learning_rate is None else config.muon_learning_rate
    if config.muon_learning_rate is not None:
        for group in theirs:
            group["lr_scale"] = rate / config.learning_rate if rate else 0.0
    first = RowMuon(theirs, lr=rate, weight_decay=0.0, momentum=config.muon_momentum, adjust_lr_fn=SCALE)
    return MuonAdamW(first, adamw(rest, config) if rest else None)


def sgd(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=config.learning_rate)


def adafactor(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """transformers' Adafactor with the learning rate of the schedule, as its Trainer sets it up."""
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=config.learning_rate, scale_parameter=False, relative_step=False)


def bitsandbytes(name: str) -> Callable[[Groups, TrainConfig], torch.optim.Optimizer]:
    def make(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
        return getattr(importlib.import_module("bitsandbytes.optim"), name)(groups, **adam_numbers(config))

    return make


MAKERS: dict[str, Callable[[Groups, TrainConfig], torch.optim.Optimizer]] = {
    "adamw_torch": adamw,
    "adamw_torch_fused": fused,
    "sgd": sgd,
    "adafactor": adafactor,
    "adamw_bnb_8bit": bitsandbytes("AdamW8bit"),
    "paged_adamw_8bit": bitsandbytes("PagedAdamW8bit"),
}
BNB = ("adamw_bnb_8bit", "paged_adamw_8bit")


def _refuse(config: TrainConfig, parameters: list[nn.Parameter]) -> None:
    """What only the loaded model shows: its device, its types and whether it is split over ranks."""
    split = any(split_over(p) is not None for p in parameters)
    device = parameters[0].device.type
    if config.optim in BNB and device != "cuda":
        raise ConfigError(f"--optim {config.optim} needs CUDA and this is a {device} device; use adamw_torch_8bit")
    if split and config.optim in (*BNB, "adafactor"):
        near = "adamw_torch_8bit" if config.optim in BNB else "adamw_torch_8bit, or --sharding none"
        raise ConfigError(f"--optim {config.optim} does not know weights that are split over ranks; use --optim {near}")
    if split and config.optim == "muon" and config.optimizer_in_backward:
        raise ConfigError(
            "--optim muon gathers each matrix from all ranks, which --optimizer_in_backward would do in the middle of "
            "the backward's own exchanges; drop one of them, or use --optim adamw_torch_8bit"
        )
    if split and config.optim_offload and device != "cpu":
        raise ConfigError("--optim_offload is for one device; with weights split over ranks use --cpu_offload true")
    if config.bf16_update != "none" and not any(p.dtype is torch.bfloat16 for p in parameters):
        raise ConfigError(
            f"--bf16_update {config.bf16_update} is for bfloat16 weights; add --dtype bfloat16, or drop it"
        )


def notes_of(model: nn.Module, config: TrainConfig) -> list[str]:
    """What the reader should know of the optimizer at the start."""
    trained = [p for p in model.parameters() if p.requires_grad]
    notes = []
    if config.bf16_update == "none" and any(p.dtype is torch.bfloat16 for p in trained):
        notes.append(
            "bfloat16 weights without float32 masters: an update below 1/256 of a weight is lost, most of them at "
            "learning rates below 1e-4; --bf16_update stochastic or kahan loses none, nor does --dtype float32 --bf16 "
            "true, which computes in bf16"
        )
    if config.optim_offload and all(p.device.type == "cpu" for p in trained):
        notes.append("--optim_offload true changes nothing: the weights are on the CPU, and so are the states")
    return notes
