"""Several devices: who holds which micro-batch, and what of the weights. On one process nothing here does anything.

Ranks form a mesh replicate x shard x sequence. FSDP2 shards weights, gradients and optimizer states over shard x
sequence and keeps copies over replicate. Every rank plans the same optimizer step and takes its own micro-batches;
gradients are summed, not averaged, because every loss is normalised by counts of the whole step.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from fastrl.models.low_precision import Float32
from fastrl.models.quantised import is_quantised, quantised_parameters
from fastrl.models.tiled_mlp import decoder_layers
from fastrl.train.flags import ConfigError
from fastrl.train.launch import STORE

MESH = ("replicate", "shard", "sequence")


@dataclass(frozen=True)
class World:
    """rank of size processes. Data ranks hold different micro-batches; the sequence ranks of one hold the same.

    mesh: [replicate, shard, sequence], None on one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    sequence_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def dp_size(self) -> int:
        """Ranks with different micro-batches."""
        return self.size // self.sequence_size

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sequence_size

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_size

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of the weights between them: the first so many hold the first copy."""
        return 1 if self.mesh is None else self.mesh.size(1) * self.mesh.size(2)

    @property
    def sequence_group(self) -> dist.ProcessGroup | None:
        """Ranks that split a micro-batch between them; None where each holds its own."""
        return None if self.sequence_size == 1 else self.mesh["sequence"].get_group()

    # -- collectives ---------------------------------------------------------------------------------------------------
    def gather(self, value: Any) -> list[Any]:
        """What each rank gave, in rank order, as JSON carries it (floats exactly; tuples become lists)."""
        if self.size == 1:
            return [value]
        mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([mine.numel()]))
        longest = int(max(sizes))
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - mine.numel())))
        return [json.loads(p[: int(n)].numpy().tobytes()) for p, n in zip(parts, sizes, strict=True)]

    def gather_data(self, value: Any) -> list[Any]:
        """What each data rank gave (the first of its sequence ranks)."""
        return self.gather(value)[:: self.sequence_size]

    def from_main(self, value: Any) -> Any:
        """What rank 0 gave, as JSON carries it."""
        return self.gather(value if self.is_main else None)[0] if self.size > 1 else value

    def parts(self, x: Tensor) -> list[Tensor]:
        """[n, ...] of each rank, in rank order, on x's device; no gradient."""
        if self.size == 1:
            return [x]
        counts = self.gather(x.shape[0])
        if not any(counts):
            return [x for _ in counts]
        mine = x.detach().cpu()
        padded = mine.new_zeros((max(counts), *x.shape[1:]))
        padded[: x.shape[0]] = mine
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return [p[:n].to(x.device) for p, n in zip(parts, counts, strict=True)]

    def everywhere(self, x: Tensor) -> Tensor:
        """[n, ...] of this data rank -> [n', ...] of all of them, in rank order; no gradient."""
        return x if self.size == 1 else torch.cat(self.parts(x)[:: self.sequence_size])

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Each number added up over the data ranks; a name that some of them lack counts as 0 there."""
        if self.size == 1:
            return values
        out: dict[str, float] = {}
        for part in self.gather_data(values):
            for name, value in part.items():
                out[name] = out.get(name, 0.0) + value
        return out


ALONE = World()


# -- joining -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def joined(config: Any) -> Iterator[World]:
    """The world that RANK, WORLD_SIZE and LOCAL_RANK tell of (torchrun, SLURM through launch.py), or one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and not config.use_cpu
    if size == 1:
        if config.sequence_parallel_size > 1:
            raise ConfigError(
                f"--sequence_parallel_size {config.sequence_parallel_size} needs as many processes and there is one; "
                "start them with --num_processes, or drop it"
            )
        yield World(device=torch.device("cuda" if cuda else "cpu"))
        return
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        backend, store = "cpu:gloo,cuda:nccl" if cuda else "gloo", os.environ.get(STORE)
        place = {"init_method": f"file://{store}", "rank": rank, "world_size": size} if store else {}
        dist.init_process_group(backend, timeout=timedelta(seconds=config.distributed_timeout), **place)
    try:
        mesh = mesh_of(config, size, device.type)
        yield World(rank, size, local, device, mesh, config.sequence_parallel_size)
    finally:
        if ours:
            dist.destroy_process_group()


def mesh_of(config: Any, size: int, device_type: str) -> DeviceMesh:
    """[replicate, shard, sequence]. Raises ConfigError where the ranks do not divide."""
    sequence = config.sequence_parallel_size
    if size % sequence:
        raise ConfigError(f"--sequence_parallel_size {sequence} does not divide the {size} processes")
    shard = {"full": size // sequence, "none": 1, "hybrid": config.shard_size}[config.sharding]
    if shard is None:  # hybrid: a machine
        shard = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", size)) // sequence)
    if size % (sequence * shard):
        raise ConfigError(
            f"--shard_size {shard} x --sequence_parallel_size {sequence} does not divide the {size} processes"
        )
    return init_device_mesh(device_type, (size // (sequence * shard), shard, sequence), mesh_dim_names=MESH)


# -- sharding ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ShardOptions:
    """compute: dtype of weights while they are used; None: that in which they are kept."""

    reshard_after_forward: bool = True
    cpu_offload: bool = False
    compute: torch.dtype | None = None


def shard(model: nn.Module, world: World, options: ShardOptions) -> nn.Module:
    """Split the weights of `model` (a PackedModel, ScoreModel, ActorCritic) over the mesh, layer by layer, in place.

    Where a rank was built without weights, each layer comes from rank 0 just before it is split.
    """
    if world.size == 1:
        return model
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh = sharding_mesh(world)
    # FSDP would cast every float in the arguments, old and reference log-probs in the batch among them.
    reduce = torch.float32 if options.compute else None
    policy = MixedPrecisionPolicy(param_dtype=options.compute, reduce_dtype=reduce, cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy()
    whole = quantised_parameters(model)
    how = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload, "ignored_params": whole}
    absent = any(world.gather(any(p.is_meta for p in model.parameters())))
    done: set[nn.Module] = set()

    def cut(module: nn.Module, **more: Any) -> None:
        if absent:
            hand_out(module, world, done)
        fully_shard(module, **how | more)

    for root in roots(model):
        for module in [m for m in root.modules() if isinstance(m, Float32)]:  # its weights are used as they are
            cut(module, mp_policy=MixedPrecisionPolicy())
        for module in [*decoder_layers(root), *own_groups(root)]:
            cut(module, reshard_after_forward=options.reshard_after_forward)
        cut(root)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model


@torch.no_grad()
def hand_out(module: nn.Module, world: World, done: set[nn.Module]) -> None:
    """Give every rank the weights and buffers that rank 0 has in `module`, whole, on its own device.

    done: modules that have theirs; those of `module` are added. Quantised weights are left: every rank has read them.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # id of a tensor -> itself, lest another gets its id, and the new one
    for part in [m for m in module.modules() if m not in done]:
        done.add(part)
        for held in (part._parameters, part._buffers):
            for name, x in held.items():
                if x is None or is_quantised(x):
                    continue
                if id(x) not in made:
                    made[id(x)] = x, tensor_from_main(x, world)
                held[name] = made[id(x)][1]


def tensor_from_main(x: Tensor, world: World) -> Tensor:
    """Rank 0's tensor on this rank's device. x: that tensor, which is moved, or one of its shape and dtype."""
    y = x
    if not world.is_main:
        y = torch.empty(x.shape, dtype=x.dtype, device=world.device)
    elif x.device != world.device:
        x.data = x.to(world.device)
    if x.numel():
        dist.broadcast(y.detach().contiguous().view(-1).view(torch.uint8), src=0)  # bytes: any dtype goes
    if isinstance(x, nn.Parameter) and not world.is_main:
        return nn.Parameter(y, x.requires_grad)
    return y


def sharding_mesh(world: World) -> DeviceMesh:
    """[replicate, shard x sequence], or [shard x sequence] where nothing is replicated."""
    flat = init_device_mesh(
        world.device.type, (world.size // world.shards, world.shards), mesh_dim_names=("replicate", "fsdp")
    )
    return flat["fsdp"] if world.shards == world.size else flat


def roots(model: nn.Module) -> list[nn.Module]:
    """The modules whose forward is called from outside: the model, or the actor and the critic in it."""
    parts = [m for m in (getattr(model, "actor", None), getattr(model, "critic", None)) if m is not None]
    return parts or [model]


def own_groups(root: nn.Module) -> list[nn.Module]:
    """Embedding and head, where no weight is shared between them: each is whole only while it runs."""
    body, head = root.model.get_input_embeddings(), getattr(root, "head", None)
    if body is None or head is None or {*body.parameters()} & {*head.parameters()}:
        return []
    return [body, head]


def reshard(model: nn.Module) -> None:
    """Drop whole copies of split weights that a forward has left: parameters are then what each rank holds."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(x: Tensor) -> Tensor:
    """The whole of a tensor of which each rank may hold a part. Every rank has to call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x
