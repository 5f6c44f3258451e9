"""What a run may fill: names of devices and their memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastrl.train.flags import ConfigError

GIB = 1 << 30
# GiB that torch reports as total memory, a little less than what the name says.
KNOWN = {"h200": 139.7, "h100-80": 79.1, "a100-80": 79.1, "a100-40": 39.4, "l40s": 44.4, "rtx4090": 23.5}
# Taken before the first tensor is there: the CUDA context and libraries' workspaces; the interpreter and its libraries.
BASE = {"cuda": int(0.75 * GIB), "cpu": int(0.55 * GIB)}
# Part of the memory that is left free: what an allocator cannot use between blocks of other sizes.
SPARE = {"cuda": 0.05, "cpu": 0.05}


@dataclass(frozen=True)
class Device:
    """kind: cuda or cpu. capacity: bytes of one device."""

    name: str
    kind: str
    capacity: int

    @property
    def base(self) -> int:
        return BASE[self.kind]

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.capacity * (1 - SPARE[self.kind]))


def device_of(name: str | None) -> Device:
    """By name, as NNGiB (a GPU of that size), or the one that is here (None).

    Raises ConfigError for an unknown name.
    """
    if name is None:
        return here()
    if name == "cpu":
        return Device("cpu", "cpu", host_memory())
    if name in KNOWN:
        return Device(name, "cuda", int(KNOWN[name] * GIB))
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GiB|GB|G)?", name, re.IGNORECASE):
        return Device(name, "cuda", int(float(match[1]) * GIB))
    raise ConfigError(f"--device must be one of {', '.join(KNOWN)}, cpu, or a size such as 48GiB; got {name!r}")


def here() -> Device:
    import torch

    if not torch.cuda.is_available():
        return Device("cpu", "cpu", host_memory())
    found = torch.cuda.get_device_properties(0)
    return Device(found.name, "cuda", found.total_memory)


def host_memory() -> int:
    """Bytes of memory of this machine, or of the container it is in; 16 GiB where neither can be read."""
    found = []
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        found.append(int(text))
    total = Path("/proc/meminfo")
    if total.exists():
        found.append(int(total.read_text().split("MemTotal:")[1].split()[0]) * 1024)
    return min(found, default=16 * GIB)
