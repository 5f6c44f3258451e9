"""What every measurement shares: a record of the machine, alternating rounds, honest peak memory, a JSON file.

Peak memory on the CPU is the process's own high-water mark (VmHWM), set back to the present size through
/proc/self/clear_refs just before the measured call. It sees everything the call really makes resident: tensors,
autograd buffers and the GEMM library's packing buffers alike. It is taken in a process of its own for each contender,
so that no allocator state is inherited. Where /proc cannot do that (macOS), the peak is None rather than a guess.
On CUDA it is torch's own count of allocated bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the checkout; above site-packages when installed from a wheel
MIB = 1 << 20
PACKAGES = ("torch", "triton", "transformers", "trl", "liger_kernel", "cut_cross_entropy", "quack_kernels", "datasets")


# -- the machine -------------------------------------------------------------------------------------------------------
def environment(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What a reader needs to judge or repeat a number."""
    return {
        "device": device_name(device),
        "threads": threads,
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "git_commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", "fastrl", "kernels", "csrc", "bench/*.py")),
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    wide = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else platform.machine()
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores, {wide}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str:
    """Output of git in the checkout that holds this file; "" outside one (an installed wheel has no commit)."""
    if not ((ROOT / ".git").exists() and (ROOT / "pyproject.toml").exists()):
        return ""
    done = subprocess.run(("git", *args), cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


# -- time --------------------------------------------------------------------------------------------------------------
def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def cpu_seconds() -> tuple[float, float, float]:
    """(clock, CPU seconds of the whole machine, CPU seconds of this process and the children it has waited for)."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return time.monotonic(), 0.0, 0.0
    # user nice system idle iowait irq softirq steal
    ticks = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
    return time.monotonic(), (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def disturbance(before: tuple, after: tuple) -> float:
    """Cores that other processes (or the host) used meanwhile; negative rounding errors count as 0.

    The kernel counts in ticks of 10 ms, and late: of less than a quarter of a second it says nothing, so that is 0.
    """
    elapsed, machine, own = (b - a for a, b in zip(before, after, strict=True))
    return max(0.0, (machine - own) / elapsed) if elapsed > 0.25 else 0.0


def undisturbed(call: Callable[[], Any], limit: float | None, tries: int = 20) -> Any:
    """Call again until others used fewer than `limit` cores meanwhile; a busy machine is waited for. None: once."""
    if limit is None:
        return call()
    for left in reversed(range(tries)):
        before = cpu_seconds()
        result = call()
        busy = disturbance(before, cpu_seconds())
        if busy < limit:
            return result
        print(f"disturbed: others used {busy:.2f} cores; {left} tries left", file=sys.stderr, flush=True)
        wait_until_quiet(limit)
    raise RuntimeError(f"the machine never was quiet: others used {limit} cores or more in {tries} tries; see --quiet")


def wait_until_quiet(limit: float, patience_s: float = 600.0) -> None:
    """Return after two seconds in a row in which others used fewer than `limit` cores, or when patience ends."""
    calm, began = 0, time.monotonic()
    while calm < 2 and time.monotonic() - began < patience_s:
        before = cpu_seconds()
        time.sleep(1.0)
        calm = calm + 1 if disturbance(before, cpu_seconds()) < limit else 0


def timed(call: Callable[[], Any], device: str = "cpu") -> float:
    synchronize(device)
    began = time.perf_counter()
    result = call()
    synchronize(device)
    seconds = time.perf_counter() - began
    del result
    return seconds


@contextlib.contextmanager
def time_limit(limit: float | None) -> Iterator[None]:
    """TimeoutError after `limit` seconds, as soon as Python runs again. None: no limit. Main thread only."""
    if limit is None:
        yield
        return

    def ring(*_):
        raise TimeoutError(f"took longer than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(limit, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def alternate(
    calls: dict[Any, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    limit: float | None = 0.2,
    deadline: float | None = None,
) -> dict[Any, list[float]]:
    """Seconds of each call, A B C A B C ... `rounds` times after one warm-up, so that a slow minute hits all alike.

    A call during which others used `limit` cores or more is timed again. No round but the first begins after `deadline`
    (of time.monotonic).
    """
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timed(call, device)
    for i in range(rounds):
        if i and deadline is not None and time.monotonic() > deadline:
            break
        for name, call in calls.items():
            seconds[name].append(undisturbed(lambda call=call: timed(call, device), limit))
    return seconds


def summary(seconds: list[float]) -> dict[str, Any]:
    return {
        "median_s": _round(statistics.median(seconds)),
        "min_s": _round(min(seconds)),
        "all_s": [_round(s) for s in seconds],
    }


def _round(seconds: float) -> float:
    """Four significant digits: a kernel of 80 microseconds needs other decimals than one of 8 s."""
    return float(f"{seconds:.4g}")


# -- memory ------------------------------------------------------------------------------------------------------------
def resident_mib(field: str = "VmRSS") -> float:
    """VmRSS (now) or VmHWM (highest since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {field}; expected VmRSS or VmHWM on Linux")


def settle() -> float | None:
    """Give freed memory back to the system, set the high-water mark to the present size; returns that size in MiB."""
    gc.collect()
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident_mib()


def extra_peak_mib(call: Callable[[], Any], device: str = "cpu") -> tuple[float | None, Any]:
    """(peak of `call` over what was there before, its result). The result is alive at the peak, so it counts."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / MIB, result
    before = settle()
    result = call()
    return (None if before is None else resident_mib("VmHWM") - before), result


# -- subprocesses and files --------------------------------------------------------------------------------------------
def in_subprocess(script: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """Run a script (x.py) or a module (a.b) in a fresh process; its last line of output is a JSON object."""
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *([script] if script.endswith(".py") else ["-m", script]), *arguments]
    environ = {**os.environ, **limits, **quiet, "PYTHONPATH": path}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def command() -> str:
    """The command line that is running, to be repeated by a reader; where its output goes is left out."""
    words = sys.argv[1:]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    name = Path(sys.argv[0]).name
    return " ".join([*(["fastrl"] if name in ("fastrl", "__main__.py") else ["python", f"bench/{name}"]), *words])


def write_json(path: Path | str, record: dict[str, Any]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
