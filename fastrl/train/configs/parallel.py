"""Flags of several devices: how many processes, how weights are sharded, how long sequences are split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastrl.train.flags import ConfigError, flag

SHARDING = ("full", "hybrid", "none")


@dataclass(kw_only=True)
class ParallelFlags:
    """Sharding (FSDP2) and sequence parallelism. On one process none of them does anything."""

    title: ClassVar[str] = "several devices"

    num_processes: int | None = flag(
        None, "Processes to start on this machine; none: one a visible GPU, one on the CPU.", at_least=1
    )
    sharding: str = flag(
        "full",
        "Weights, gradients, optimizer: full splits them over all ranks, hybrid over shard_size neighbours (HSDP), "
        "none keeps a copy on each.",
        choices=SHARDING,
    )
    shard_size: int | None = flag(
        None, "Ranks that share one copy with --sharding hybrid; none: those of a machine.", at_least=1
    )
    reshard_after_forward: bool = flag(True, "Free a layer's weights after its forward; false: more memory, less time.")
    cpu_offload: bool = flag(False, "Sharded weights, gradients and optimizer live in CPU memory (CUDA only).")
    sequence_parallel_size: int = flag(
        1, "Neighbouring ranks that split each packed sequence between them (Ulysses).", at_least=1
    )
    distributed_timeout: float = flag(600.0, "Seconds that a rank waits for the others before it fails.", above=0)

    def _check_parallel(self) -> None:
        if self.shard_size is not None and self.sharding != "hybrid":
            raise ConfigError(f"--shard_size {self.shard_size} needs --sharding hybrid, got {self.sharding}")
        chosen = getattr(self, "attn_implementation", None)
        if self.sequence_parallel_size > 1 and not (chosen or "fastrl_packed").startswith("fastrl_packed"):
            raise ConfigError(
                f"--sequence_parallel_size {self.sequence_parallel_size} splits fastrl's packed attention between "
                f"ranks, not {chosen}; drop --attn_implementation"
            )
