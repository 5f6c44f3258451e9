"""One door to what a forward keeps for its backward, and to how the layers of the body compute: `apply`.

Nothing here changes results beyond rounding, float8 apart. What a model or a device cannot do is said in the model's
notes where the run is right without it, and raised where the user would be misled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastrl.models.checkpointing import checkpoint_layers
from fastrl.models.compiled import compile_layers
from fastrl.models.low_precision import compute_in_float32, convert_to_float8
from fastrl.models.offload import Offloader, SideStream
from fastrl.models.packed import PackedModel
from fastrl.models.tiled_mlp import AUTO, tile_layers

__all__ = ["AUTO", "Switches", "apply"]


@dataclass(frozen=True)
class Switches:
    """What `apply` does to a model. The defaults do nothing.

    checkpointing: recompute each layer in the backward. policy: full keeps its input alone; selective also attention
    and every other matrix product.
    offload: the inputs that checkpointing keeps wait in pinned CPU memory. tiled_mlp: tiles of tokens in which an MLP
    runs (AUTO: tiles of a fixed size). compile: layers through torch.compile. fp8: a recipe of torchao's.
    float32: patterns of names of modules that compute in float32 under autocast.
    """

    checkpointing: bool = False
    policy: str = "full"
    offload: bool = False
    tiled_mlp: int = 0
    compile: bool = False
    fp8: str | None = None
    float32: tuple[str, ...] = ()

    def scoring(self) -> Switches:
        """Those that matter to a model that is never trained, such as a reference."""
        return Switches(tiled_mlp=self.tiled_mlp, compile=self.compile, float32=self.float32)


def apply(model: nn.Module, switches: Switches, device: torch.device | None = None) -> None:
    """Turn the switches on in a PackedModel, a ScoreModel or an ActorCritic, in place, before it is sharded.

    Adapters must be in it already. device: where it will run; None: where its weights are.

    Raises ValueError or UnsupportedModelError, naming the flag, for what cannot be done.
    """
    for packed in parts_of(model):
        where = next(packed.parameters()).device if device is None else torch.device(device)
        if switches.float32:
            compute_in_float32(packed.model, switches.float32)
        if switches.tiled_mlp not in (0, 1):
            packed.notes += tile_layers(packed.model, switches.tiled_mlp)
        if switches.fp8:
            packed.notes += convert_to_float8(packed.model, packed.head, switches.fp8, where)
        if switches.compile:
            packed.notes += compile_layers(packed.model, where)
        if switches.checkpointing:
            checkpoint_layers(packed, switches.policy, _offloader(packed, switches, where), switches.compile)


def parts_of(model: nn.Module) -> list[PackedModel]:
    """The model, or the actor and the critic in it."""
    parts = [m for m in (getattr(model, "actor", None), getattr(model, "critic", None)) if m is not None]
    return parts or [model]


def _offloader(packed: PackedModel, switches: Switches, device: torch.device) -> Offloader | None:
    if not switches.offload:
        return None
    if device.type != "cuda":
        packed.notes.append(
            f"--activation_offloading does nothing here: {device.type} is where activations would be offloaded to"
        )
        return None
    return Offloader(SideStream(device))
