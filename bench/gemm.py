"""The CPU head's own matrix product against torch's, at the shapes the head asks for.

    python bench/gemm.py                           about a minute on two cores
    python bench/gemm.py --rounds 2 --scale 8 --out /tmp/x.json     a rehearsal

fp32, random matrices, both in one process in alternating rounds. A tile of W words meets a chunk of C tokens:

    logits     [W, H] [H, C]      dW      += [W, C] [C, H]      dH      [C, W] [W, H]

W, dW and the logits are those of one tile after another, together larger than any cache, as they are in the head; a
timed call goes through all of them. The errors are relative L2 against float64, of the first tile. `used` says whether
the head takes its own product on this machine.
"""

from __future__ import annotations

import argparse
from typing import Any

import common
import torch
from torch import Tensor

from fastrl.ops import rows_native

SHAPES = ((4608, 208, 512), (4608, 144, 896), (2304, 512, 256), (2304, 208, 4096))  # words, tokens, hidden
WHO = ("own", "torch")
MEMORY = 128 << 20  # bytes of W
Product = tuple[Tensor, Tensor, Tensor]


def products(words: int, tokens: int, hidden: int) -> dict[str, list[Product]]:
    """Of each product (a, b, out) for every tile."""
    g = torch.Generator().manual_seed(0)
    count = -(-MEMORY // (4 * words * hidden))
    shapes = ((count, words, hidden), (tokens, hidden), (words, tokens))
    weight, states, dlogits = (torch.randn(shape, generator=g) for shape in shapes)
    d_weight, d_hidden, logits = torch.zeros_like(weight), torch.zeros_like(states), torch.zeros(count, words, tokens)
    return {
        "logits": [(w, states.t(), z) for w, z in zip(weight, logits, strict=True)],
        "dW": [(dlogits, states, d_w) for d_w in d_weight],
        "dH": [(dlogits.t(), w, d_hidden) for w in weight],
    }


def measure(name: str, tiles: list[Product], args: argparse.Namespace) -> dict[str, Any]:
    add = name == "dW"  # the head adds a chunk's dW to that of the chunks before it

    def own(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return rows_native.gemm(a, b, out, add)

    def library(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        return out.addmm_(a, b) if add else torch.mm(a, b, out=out)

    made = dict(zip(WHO, (own, library), strict=True))
    calls = {who: (lambda one=one: [one(*tile) for tile in tiles]) for who, one in made.items()}
    seconds = common.alternate(calls, args.rounds, limit=args.quiet or None)
    a, b, out = tiles[0]
    flop, truth = 2 * a.shape[0] * a.shape[1] * b.shape[1], a.double() @ b.double()
    row: dict[str, Any] = {"product": name, "m": a.shape[0], "n": b.shape[1], "k": a.shape[1], "tiles": len(tiles)}
    for who, one in made.items():
        each = common.summary([s / len(tiles) for s in seconds[who]])
        error = ((one(a, b, torch.zeros_like(out)) - truth).norm() / truth.norm()).item()
        row[who] = each | {"gflops": round(flop / each["median_s"] / 1e9, 1), "error": float(f"{error:.2e}")}
    row["speedup"] = round(row["torch"]["median_s"] / row["own"]["median_s"], 3)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=int, default=1, help="words divided by this")
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores; 0: never")
    parser.add_argument("--out", help="another file than bench/results/gemm_cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if rows_native.library()[0] is None:
        raise SystemExit(f"there is nothing to measure: {rows_native.library()[1]}")
    rows = []
    for words, tokens, hidden in SHAPES:
        for name, tiles in products(words // args.scale, tokens, hidden).items():
            row = measure(name, tiles, args)
            rates = (f"{who} {row[who]['gflops']:6.1f} GFLOP/s (error {row[who]['error']:.1e})" for who in WHO)
            shape = f"{row['m']:5d} x {row['n']:5d} x {row['k']:5d}"
            print(f"{name:6s} {shape}", *rates, f"{row['speedup']:.2f}x", sep="  ")
            rows.append(row)
    record = {"bench": "gemm", "command": common.command(), "scale": args.scale, "used": rows_native.own_gemm()}
    record |= {"isa": rows_native.library()[1], "rows": rows, "environment": common.environment(args.threads)}
    print(common.write_json("gemm_cpu", record, args.out))


if __name__ == "__main__":
    main()
