"""What every script here shares: fastrl.bench.machine, and where the results lie.

Importing it makes fastrl importable from the checkout, installed or not.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

if importlib.util.find_spec("fastrl") is None:  # not installed: run from the checkout
    sys.path.insert(0, str(ROOT))

from fastrl.bench import machine  # noqa: E402
from fastrl.bench.machine import (  # noqa: E402
    MIB,
    alternate,
    command,
    device_name,
    environment,
    extra_peak_mib,
    in_subprocess,
    resident_mib,
    settle,
    summary,
    timed,
    undisturbed,
)

__all__ = [
    "MIB",
    "RESULTS",
    "ROOT",
    "alternate",
    "command",
    "device_name",
    "environment",
    "extra_peak_mib",
    "in_subprocess",
    "resident_mib",
    "settle",
    "summary",
    "timed",
    "undisturbed",
    "write_json",
]


def write_json(name: str, record: dict[str, Any], out: str | None = None) -> Path:
    """bench/results/<name>.json, or `out`."""
    return machine.write_json(out or RESULTS / f"{name}.json", record)
