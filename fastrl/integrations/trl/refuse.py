"""What a patched trainer could not honour, said at the door."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastrl.integrations.deferred import deferring
from fastrl.integrations.heads import causal_lm_of
from fastrl.integrations.linear import parts_of
from fastrl.models import LogitTransform, UnsupportedModelError
from fastrl.models.check import evaluating

KINDS = ("SFT", "DPO", "KTO", "GRPO", "RLOO")


class UnsupportedTrainerError(ValueError):
    """The trainer is set up in a way that fastrl's head cannot honour: the message names it."""


def kind_of(trainer: Any) -> str:
    """Which of TRL's trainers it is, subclasses included. Raises TypeError on anything else."""
    import trl

    for kind in KINDS:
        if isinstance(trainer, getattr(trl, f"{kind}Trainer")):
            return kind
    names = ", ".join(f"{kind}Trainer" for kind in KINDS)
    raise TypeError(f"trainer is a {type(trainer).__name__}; expected one of TRL's {names}")


def refuse(trainer: Any, kind: str) -> None:
    """Raises UnsupportedTrainerError with every reason."""
    reasons = [text for wrong, text in _reasons(trainer, kind) if wrong]
    if reasons:
        raise UnsupportedTrainerError(f"{type(trainer).__name__} cannot be patched: {'; '.join(reasons)}")


def _reasons(trainer: Any, kind: str):
    args = trainer.args
    read = lambda name, default=None: getattr(trainer, name, default)  # noqa: E731
    yield (
        read("_is_vlm", False),
        "its model takes images (a vision-language model); text models are served",
    )
    yield args.torch_compile, "torch_compile=True; what is fused here is compiled already, set it to False"
    yield args.use_liger_kernel, "use_liger_kernel=True replaces layers of the model; set it to False"
    yield (
        read("aux_loss_enabled", False),
        f"a router's load-balancing loss is on (router_aux_loss_coef={read('router_aux_loss_coef')}); set it to 0",
    )
    if kind == "SFT":
        yield read("compute_loss_func") is not None, "compute_loss_func takes the logits, which are never formed"
        yield read("label_smoother") is not None, "label_smoothing_factor is read off the logits by transformers"
    yield read("is_deepspeed_enabled", False), "DeepSpeed gathers the head in its own way"
    yield read("is_fsdp_enabled", False), "FSDP shards the head"
    parallel = trainer.accelerator.parallelism_config
    for name in ("tp", "cp", "sp"):
        size = getattr(parallel, f"{name}_size", 1) if parallel is not None else 1
        yield size > 1, f"{name}_size={size} cuts the sequence or the head over ranks"
    base = causal_lm_of(trainer.model)
    if getattr(args, "cast_lm_head_to_fp32", False):
        adapted = bool(parts_of(base.get_output_embeddings()).adapters)
        yield adapted, "cast_lm_head_to_fp32=True: generation would pass the head's adapter by; set it to False"
    forward = vars(base).get("forward")
    yield forward is None, f"{type(base).__name__} was not given a head by TRL; patch a trainer as TRL 1.16 makes it"


def check_head(model: nn.Module | None) -> None:
    """One word goes through the model, its logits deferred. Raises UnsupportedModelError if the head is no linear map,
    or if the model does more to its logits than its config says."""
    if model is None:
        return
    word = torch.zeros((1, 1), dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with evaluating(model), deferring(model):
        done = model(input_ids=word, use_cache=False).logits.head.transform
    said = LogitTransform.of(model.config)
    if not (_near(done.scale, said.scale) and _near(done.softcap or 0.0, said.softcap or 0.0)):
        raise UnsupportedModelError(f"{type(model).__name__} makes {done} of its logits, but its config says {said}")


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5)
