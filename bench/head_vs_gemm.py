"""The LM head's forward and backward against three bare GEMMs and against every rival that is installed.

    python bench/head_vs_gemm.py                      N=2048 D=512 V=65536 fp32 on the CPU, clipped policy loss
    python bench/head_vs_gemm.py --loss nll           mean cross-entropy
    python bench/head_vs_gemm.py --loss dpo           DPO

`fastrl bench` at the shape of the published tables, written to results/head_<loss>_<device>_<dtype>.json; every flag of
`fastrl bench` works here too. docs/benchmarks.md says what each number means.
"""

from __future__ import annotations

import sys

import common

from fastrl.bench.command import measured, parser, show

PUBLISHED = dict(rows=2048, hidden=512, vocabulary=65536, rounds=5, quiet=0.2, out=None)


def main() -> None:
    flags = parser()
    flags.set_defaults(**PUBLISHED)
    args = flags.parse_args()
    record = {**measured(args), "command": common.command()}
    name = f"head_{args.loss}_{args.device.split(':')[0]}_{args.dtype}"
    show(record, args, common.RESULTS / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
