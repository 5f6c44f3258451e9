"""Which parameters decay, and which of them Muon moves."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastrl.models.head import LMHead
from fastrl.models.score import ScoreHead

Groups = list[dict[str, Any]]
HEADS = (LMHead, ScoreHead)


def decay_names(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay shrinks: matrices that belong to no norm layer."""
    norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    return {n for n, p in model.named_parameters() if p.dim() >= 2 and n not in norms and not n.endswith("bias")}


def muon_names(model: nn.Module) -> set[str]:
    """Names of the weights of linear layers of the body: no embedding, head, norm, bias, adapter or stack of experts.

    Jordan et al. 2024 and Liu et al. 2025 (arXiv 2502.16982) leave those to AdamW. Stacked experts [E, out, in] are no
    matrices and stay with it too.
    """
    taken, kept = set(), set()
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if linear and weight.dim() == 2 and not isinstance(module, HEADS) and "lora_" not in path:
            taken.add(id(weight))
        else:
            kept.add(id(weight))  # a head whose weight is the embedding stays with AdamW under either name
    return {n for n, p in model.named_parameters() if id(p) in taken - kept}


def groups_of(model: nn.Module, weight_decay: float) -> Groups:
    """The trainable parameters in two groups, with and without decay. Raises ValueError if nothing is trainable."""
    decayed = decay_names(model)
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter of the model requires a gradient; unfreeze what should be trained")
    groups = [
        {"params": [p for n, p in trainable if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in trainable if n not in decayed], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]
