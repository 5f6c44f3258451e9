"""Compile every kernel with every default tile ahead of time, without a GPU, and show what it costs on the chip.

    python bench/aot_check.py [--arch sm_90 ...] [--variant full ...] [--kernel linear_stats ...] [--json FILE]

Exit status 1 if a kernel does not compile, wants more shared memory than the chip has, or if a default tile of sm_90
spills registers. Run it without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastrl.kernels import (  # noqa: E402
    divergence_dlogits,
    divergence_stats,
    gae,
    linear_dlogits,
    linear_stats,
    policy_loss,
    row_dlogits,
    row_stats,
    segments,
    support_stats,
    tiles,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# KiB of shared memory one program may use (CUDA programming guide, table of compute capabilities; CDNA3 LDS).
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
POINTERS = {
    **dict.fromkeys(("bias", "hidden", "weight", "source", "out", "dz"), "*bf16"),
    **dict.fromkeys(("outer_rows", "parts", "top", "rise", "fall", "at_target", "d_bias_parts", "raw"), "*fp32"),
    **{"targets": "*i64", "firsts": "*i32", "out_hits": "*i8", "rows": "*i64"},
    **dict.fromkeys(("inner", "outer", "log_v"), "fp32"),
    **dict.fromkeys(("logprobs", "entropy", "old", "ref", "advantages"), "*fp32"),
    **dict.fromkeys(("log_high", "log_low", "log_dual", "ratio_high", "ratio_low", "ratio_dual"), "fp32"),
    **{"weights": "*fp64", "kl_coef": "fp32", "entropy_coef": "fp32", "beta": "fp32", "factor": "fp32"},
    **{"actions": "*u8", **dict.fromkeys(("gamma", "gamma_rest", "decay", "decay_rest"), "fp32")},
    **dict.fromkeys(("values", "per_segment", "coef", "rewards", "bootstrap"), "*fp32"),
    **dict.fromkeys(("bounds", "indices", "index", "starts", "stops"), "*i64"),
}
POINTERS |= dict.fromkeys(("other_hidden", "other_weight", "other_bias"), "*bf16") | {"alpha": "fp32", "beta": "fp32"}
POINTERS |= dict.fromkeys(("other_outer_rows", "other_raw", "norms", "law"), "*fp32")
POINTERS |= dict.fromkeys(("other_inner", "other_outer"), "fp32")
ALIGNED = (
    "K",
    "stride_gn",
    "stride_uv",
    "H",
    "stride_hn",
    "stride_wv",
    "stride_dn",
    "stride_n",
    "stride_sn",
    "stride_on",
)
# plain: log-probs, nothing else, V a multiple of 16. entropy: with it. full: every statistic and option, any V.
VARIANTS = ("plain", "entropy", "full")


@dataclass(frozen=True)
class Case:
    kernel: str
    arch: str
    variant: str
    tile: tiles.Tile
    descriptors: bool
    dtype: str = "bf16"


@dataclass
class Result:
    case: Case
    seconds: float = 0.0
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    error: str = ""

    @property
    def failed(self) -> bool:
        too_big = self.shared > SHARED_KIB[self.case.arch] * 1024
        return bool(self.error) or too_big or (self.case.arch == "sm_90" and (self.spills > 0 or self.stack > 0))


KERNELS = {
    "linear_stats": linear_stats.linear_stats_kernel,
    "finish_stats": linear_stats.finish_stats_kernel,
    "linear_dlogits": linear_dlogits.linear_dlogits_kernel,
    "row_stats": row_stats.row_stats_kernel,
    "row_dlogits": row_dlogits.row_dlogits_kernel,
    "compact_rows": row_dlogits.compact_rows_kernel,
    "divergence_stats": divergence_stats.divergence_stats_kernel,
    "divergence_dlogits": divergence_dlogits.divergence_dlogits_kernel,
    "divergence_row_stats": divergence_stats.divergence_row_stats_kernel,
    "divergence_row_dlogits": divergence_dlogits.divergence_row_dlogits_kernel,
    "policy_loss": policy_loss.policy_loss_kernel,
    "finish_sums": policy_loss.finish_sums_kernel,
    "gae": gae.gae_kernel,
    "segment_sum": segments.segment_sum_kernel,
    "segment_spread": segments.segment_spread_kernel,
    "pair_logits": segments.pair_logits_kernel,
    "support_stats": support_stats.support_stats_kernel,
    "support_dlogits": support_stats.support_dlogits_kernel,
    "gather_sum": support_stats.gather_sum_kernel,
}
GEMMS = {"linear_stats": tiles.LINEAR_STATS, "linear_dlogits": tiles.LINEAR_DLOGITS}
TWO_HEADS = {"divergence_stats": tiles.DIVERGENCE_STATS, "divergence_dlogits": tiles.DIVERGENCE_DLOGITS}
GATHERS = ("support_stats", "gather_sum")
VECTORS = ("policy_loss", "finish_sums", "segment_sum", "segment_spread", "pair_logits", "support_dlogits", "gae")
TABLES = {**GEMMS, **TWO_HEADS, **dict.fromkeys(VECTORS, tiles.VECTORS), **dict.fromkeys(GATHERS, tiles.GATHER)}
ONE_VARIANT = ("finish_stats", "compact_rows", *VECTORS)


def cases(archs: list[str], variants: list[str], kernels: list[str]) -> list[Case]:
    """Every (kernel, architecture, variant), with the table's tile, the pointer fallback and the fp32 tile."""
    made = []
    for arch in archs:
        for kernel in kernels:
            tile = TABLES.get(kernel, tiles.ROWS)[arch]
            for variant in variants if kernel not in ONE_VARIANT else ["full"]:
                made.append(Case(kernel, arch, variant, tile, tile.descriptors))
                if kernel in TWO_HEADS and variant == "full" and tile.descriptors:
                    made.append(Case(kernel, arch, variant, tiles.DIVERGENCE_POINTERS, False))
                if kernel in GEMMS and variant == "full":
                    made.append(Case(kernel, arch, variant, tiles.FP32_LINEAR, False, "fp32"))
                    if tile.descriptors:
                        made.append(Case(kernel, arch, variant, tiles.POINTERS, False))
    return made


def constants(case: Case) -> dict:
    """Values of the constexpr arguments, as the launchers choose them."""
    full, tile = case.variant == "full", case.tile
    values = dict(BLOCK_N=tile.rows, BLOCK_V=tile.columns, BLOCK_K=tile.depth, BLOCK=256, GROUP=16, PARTS=tile.parts)
    values |= dict(TMA=case.descriptors, EVEN_K=not full or case.descriptors, WIDEN=False)
    values |= dict.fromkeys(("SOFTCAP", "SQUARES", "ARGMAX"), full) | dict(ENTROPY=case.variant != "plain")
    values |= dict(stride_hk=1, stride_wk=1, STEPS=policy_loss.STEPS, DUAL=True, KIND=3)
    if TABLES.get(case.kernel) is tiles.VECTORS:
        values |= dict(BLOCK=tile.columns, MEAN=True, PAIRS=True, ACC=tl.float32)
    if case.kernel.startswith("divergence"):
        values |= dict(KIND=2, OTHER_SOFTCAP=full, stride_gk=1, stride_uk=1)
    if case.kernel in GATHERS:
        values |= dict(BLOCK_H=tile.columns, SPAN=support_stats.SPAN)
    if not full:
        values |= dict.fromkeys(("bias", "outer_rows", "d_bias_parts", "other_bias", "other_outer_rows"))
    return values


def source(case: Case) -> ASTSource:
    kernel = KERNELS[case.kernel]
    fixed = {k: v for k, v in constants(case).items() if k in kernel.arg_names}
    types = {name: POINTERS.get(name, "i32").replace("bf16", case.dtype) for name in kernel.arg_names}
    types |= {n: "*fp32" for n in types if n.startswith("out_") and n != "out_hits"}
    if case.descriptors:
        for name in ("hidden", "weight", "other_hidden", "other_weight"):
            rows = case.tile.rows if name.endswith("hidden") else case.tile.columns
            if name in types:
                types[name] = f"tensordesc<{case.dtype}[{rows}, {case.tile.depth}]>"
    types |= dict.fromkeys(fixed, "constexpr")
    divisible = ALIGNED if case.variant == "full" else (*ALIGNED, "V")
    aligned = [n for n, t in types.items() if t.startswith("*") or (n in divisible and t == "i32")]
    attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    return ASTSource(kernel, types, constexprs=fixed, attrs=attributes)


def compile_case(case: Case) -> Result:
    result, start = Result(case), time.perf_counter()
    try:
        made = triton.compile(source(case), target=TARGETS[case.arch], options=case.tile.options())
    except Exception as error:  # the table must show every kernel that fails, not only the first
        result.error = f"{type(error).__name__}: {error}"
        return result
    result.seconds = time.perf_counter() - start
    result.shared = made.metadata.shared
    if "cubin" in made.asm:
        read_cubin(made.asm["cubin"], result)
    else:
        read_amdgcn(made.asm["amdgcn"], result)
    return result


def read_cubin(binary: bytes, result: Result) -> None:
    """Registers and stack from the resource usage; spills: local-memory instructions in the machine code."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        run = dict(capture_output=True, text=True, check=True)
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], **run).stdout
        code = subprocess.run([tool, "--dump-sass", file.name], **run).stdout
    result.registers = int(re.search(r"REG:(\d+)", usage)[1])
    result.stack = int(re.search(r"STACK:(\d+)", usage)[1])
    result.spills = len(re.findall(r"\b(?:STL|LDL)\b", code))


def read_amdgcn(text: str, result: Result) -> None:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    result.registers = number("vgpr_count") + number("agpr_count")
    result.stack = number("private_segment_fixed_size")
    result.spills = number("vgpr_spill_count")


def row(result: Result) -> str:
    case, tile = result.case, result.case.tile
    shape = f"{tile.rows}x{tile.columns}x{tile.depth}/{tile.num_warps}w/{tile.num_stages}s"
    load = "tma" if case.descriptors else "ptr"
    state = "FAILED" if result.failed else "ok"
    numbers = f"{result.registers:5d} {result.stack:6d} {result.spills:7d} {result.shared / 1024:8.1f}"
    name = f"{case.kernel:15s} {case.arch:7s} {case.variant:6s} {case.dtype:5s} {load:4s} {shape:18s}"
    return f"{name} {numbers} {result.seconds:6.1f}  {state} {result.error[:200]}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", action="append", choices=list(TARGETS))
    parser.add_argument("--variant", action="append", choices=VARIANTS)
    parser.add_argument("--kernel", action="append", choices=list(KERNELS))
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        print("unset TRITON_INTERPRET: interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    print("kernel          arch    flags  dtype load tile                regs  stack  spills shared/K      s")
    results = []
    for case in cases(args.arch or list(TARGETS), args.variant or list(VARIANTS), args.kernel or list(KERNELS)):
        results.append(compile_case(case))
        print(row(results[-1]), flush=True)
    failed = [r for r in results if r.failed]
    print(f"{len(results)} compiled with triton {triton.__version__}, {len(failed)} failed")
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
