"""Every kernel compiles ahead of time, without a GPU, and the sm_90 tiles do not spill (bench/aot_check.py).

In processes of their own: the kernels of this one may be interpreted (conftest.py). `make aot` checks every chip.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[1]
CLEAN = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def python(*arguments: str, environment: dict = CLEAN) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("arch,kernels", [("sm_90", ()), ("sm_80", ("linear_stats",)), ("gfx942", ("linear_stats",))])
def test_default_tiles_compile_without_spills(arch, kernels):
    only = [x for k in kernels for x in ("--kernel", k)]
    run = python("bench/aot_check.py", "--arch", arch, "--variant", "full", *only)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line for line in run.stdout.splitlines() if f" {arch} " in line]
    assert {line.split()[0] for line in lines} >= set(kernels or ("linear_stats", "linear_dlogits", "row_dlogits"))
    assert all(line.endswith(" ok") for line in lines)


@pytest.mark.parametrize(
    "tile",
    [
        "tiles.Tile(128, 256, 64, 4, 3, 1, descriptors=True)",  # half the warps: spills
        "tiles.Tile(128, 256, 64, 8, 6, 8, descriptors=True)",  # 6 stages: more shared memory than there is
    ],
)
def test_a_tile_that_does_not_fit_fails_the_check(tile):
    run = python(
        "-c",
        "import sys; sys.path.insert(0, 'bench'); import aot_check; from fastrl.kernels import tiles\n"
        f"tiles.LINEAR_STATS['sm_90'] = {tile}\n"
        "sys.argv[1:] = ['--arch', 'sm_90', '--variant', 'entropy', '--kernel', 'linear_stats']\n"
        "sys.exit(aot_check.main())",
    )
    assert run.returncode == 1 and "FAILED" in run.stdout, run.stdout + run.stderr


def test_interpreted_kernels_are_refused():
    run = python("bench/aot_check.py", environment={**CLEAN, "TRITON_INTERPRET": "1"})
    assert run.returncode == 2 and "unset TRITON_INTERPRET" in run.stderr
