"""Several gloo processes for a test: one spawn, any number of cases, no port and no listening socket."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


def run_ranks(count: int, work: Callable[..., Any], *args: Any) -> None:
    """work(*args) in `count` processes of one process group; RANK and WORLD_SIZE are set.

    Raises AssertionError with the traceback of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_rank, (count, folder, work, args), nprocs=count, join=False)
        failed = None
        try:
            while not context.join(timeout=5, grace_period=10):
                pass
        except Exception as error:
            failed = error
        told = sorted(Path(folder).glob("error-*"), key=lambda p: p.stat().st_mtime)
        if told:
            last = [f"{p.name.replace('error-', 'rank ')}: {p.read_text().splitlines()[-1]}" for p in told]
            raise AssertionError("\n".join([told[0].read_text(), *last, str(failed)]))
        if failed is not None:
            raise AssertionError(f"a rank died: {failed}")


def _rank(rank: int, count: int, folder: str, work: Callable[..., Any], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout=TIMEOUT, rank=rank, world_size=count)
    try:
        work(*args)
    except BaseException:
        Path(folder, f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the others may hang in a collective: let the parent end them
    dist.destroy_process_group()


def tell(root: Path, name: str, work: Callable[[], Any]) -> None:
    """In one of the processes: write what work() raised, or "nothing", to root/name-RANK."""
    try:
        work()
        raised = "nothing"
    except Exception as error:
        raised = f"{type(error).__name__}: {error}"
    (root / f"{name}-{os.environ['RANK']}").write_text(raised)
