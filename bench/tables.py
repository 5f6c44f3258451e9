"""bench/results/*.json -> the tables of README.md: `<!-- bench:begin -->` ... `<!-- bench:end -->`, and `quickstart:`.

    python bench/tables.py           write them
    python bench/tables.py --check   exit 1 if README.md does not show what the files say

Each table stands under the command that made its file; device, versions and commit stand under the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOSSES = {"ppo_clip": "clipped policy loss", "nll": "mean cross-entropy"}
NAMES = {"fastrl": "fastrl", "trl": "TRL"}
Record = dict[str, Any]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def where(record: Record) -> str:
    """Device, versions and commit on one line."""
    environment = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if name != "triton")
    commit = environment["git_commit"][:9] or "no commit"
    threads = f"{environment['threads']} thread{'s' if environment['threads'] > 1 else ''}"
    state = "+" if environment["uncommitted_changes"] else ""
    return f"{environment['device']}, {threads}; {versions}; commit {commit}{state}"


def made_by(record: Record, source: str) -> str:
    return f"`{record['command']}` ([JSON](bench/results/{source}))"


def mib(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f} MiB"


# -- one function per kind of record -----------------------------------------------------------------------------------
def head(record: Record, source: str) -> str:
    shape = f"N={record['rows']} D={record['hidden']} V={record['vocabulary']} {record['dtype']}"
    floor = record["three_gemms"]["median_s"]
    rows = [["three bare GEMMs", f"{floor:.2f} s", "1.00", "", "", "", ""]]
    for name, row in record["contenders"].items():
        error = row["error_vs_float64"]
        errors = [error.get(f"{output}_relative_l2") for output in ("logprobs", "d_hidden", "d_weight")]
        shown = ["" if e is None else f"{e:.1e}" for e in errors]
        rows.append([name, f"{row['median_s']:.2f} s", f"{row['times_gemms']:.2f}", mib(row["extra_peak_mib"]), *shown])
    header = ["LM head, forward + backward", "time", "x GEMMs", "extra peak memory", "log-prob error", "dH", "dW"]
    title = f"**{LOSSES[record['loss']].capitalize()}**, {shape}. Memory includes the returned gradients; errors are"
    return f"{title} relative (L2) to float64. {made_by(record, source)}\n\n{table(header, rows)}"


def trainer(record: Record, source: str) -> str:
    rows = []
    for stage, result in record["stages"].items():
        for name, row in result["contenders"].items():
            first = name == "fastrl"
            ratio = f"{result['speedup']:.1f}x faster" if first else ""
            memory = f"{result['memory_ratio']:.0%} of TRL's" if first and result["memory_ratio"] is not None else ""
            peak = " ".join(filter(None, (mib(row["peak_over_model_mib"]), f"({memory})" if memory else "")))
            label = f"{stage.upper()}, {NAMES[name]} {record['environment']['versions'].get(name, '')}".strip()
            rows.append([label, f"{row['median_s']:.2f} s", ratio, peak, f"{row['losses'][0]:.6f}"])
    model, lengths = record["model"], record["lengths"]
    batch = record["training"]["per_device_train_batch_size"]
    header = ["trainer step", "time", "", "peak over the loaded model", "loss at step 1"]
    title = (
        f"**Optimizer step**, hidden {model['hidden_size']}, {model['num_hidden_layers']} layers, vocabulary "
        f"{model['vocab_size']}, fp32; batch {batch}, prompts of lognormal length (median {lengths['prompt_median']}, "
        f"answers {lengths['answer_median']}, sigma {lengths['sigma']}, cut at {lengths['cut']}), no checkpointing."
    )
    return f"{title} {made_by(record, source)}\n\n{table(header, rows)}"


def exactness(record: Record, source: str) -> str:
    cuts = {d: max(v for k, v in record["cuts"].items() if k.endswith(d)) for d in ("float64", "float32")}
    gradients = max(record["gradients"].values())
    rows = [
        ["gradients of all losses against materialised float64 logits, in float64", f"{gradients:.0e}"],
        ["the same sequences cut and ordered otherwise, every aggregation, float64", f"{cuts['float64']:.0e}"],
        ["the same in float32", f"{cuts['float32']:.0e}"],
        ["log-probs of a saved model in plain transformers, float32 (absolute)", f"{record['saved_model']:.0e}"],
    ]
    return f"**Exactness**: worst relative (L2) error. {made_by(record, source)}\n\n{table(['', 'error'], rows)}"


def quickstart(record: Record, source: str) -> str:
    rows = []
    for run in record["runs"]:
        shown = [f"{run['accuracy'][name]:.1%}" for name in ("before", "after SFT", "after GRPO")]
        rows.append([str(run["seed"]), *shown, f"{run['seconds']:.0f} s"])
    again = "the same numbers" if record["same_seed_same_numbers"] else "OTHER numbers"
    text = f"{record['runs'][0]['prompts']} sums, greedy, exact match. Seed {record['runs'][0]['seed']} again: {again}."
    header = ["seed", "before", "after SFT", "after GRPO", "whole command"]
    return f"{table(header, rows)}\n\n{text} {made_by(record, source)}"


MAKERS: dict[str, dict[str, Callable[[Record, str], str]]] = {
    "quickstart": {"quickstart": quickstart},
    "bench": {"head_vs_gemm": head, "trainer_vs_trl": trainer, "exactness": exactness},
}


# -- README ------------------------------------------------------------------------------------------------------------
def render(results: Path, block: str) -> str:
    """Every record that has a table in the block, in the order of MAKERS, then by file name."""
    found = [(path.name, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    parts = []
    for kind, make in MAKERS[block].items():
        for source, record in found:
            if isinstance(record, dict) and record.get("bench") == kind:
                parts.append(f"{make(record, source)}\n\n<sub>{where(record)}</sub>")
    return "\n\n".join(parts)


def replace_between(text: str, body: str, block: str, name: str = "README.md") -> str:
    """`text` with `body` between the block's markers. Raises ValueError unless each stands there once, in order."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{name} must hold {begin} and then {end}, once each; add the two lines where the tables go")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}" if body else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README.md is out of date")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    text = args.readme.read_text(encoding="utf-8")
    wanted = text
    for block in MAKERS:
        wanted = replace_between(wanted, render(args.results, block), block, args.readme.name)
    if args.check:
        if wanted != text:
            print(f"{args.readme} does not show bench/results; run: python bench/tables.py", file=sys.stderr)
        return int(wanted != text)
    args.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
