"""bench/results/*.json -> the tables of README.md and docs/benchmarks.md, between `<!-- NAME:begin -->` and `:end`.

    python bench/tables.py           write them
    python bench/tables.py --check   exit 1 if a page does not show what the files say

Each table stands under the command that made its file; device, versions and commit stand under the table. What is asked
for and has no record is shown as not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import asked
import common

from fastrl.bench import report

ROOT = common.ROOT
NAMES = {"fastrl": "fastrl", "trl": "TRL"}
PLOTS = {
    "head_time.png": "Time of forward and backward against N and against V",
    "head_memory.png": "Peak memory against N and against V",
    "head_floor.png": "Share of the bare GEMMs' speed against N and against V",
}
Record = dict[str, Any]
Found = list[tuple[str, Record]]  # (file name, record)
table = report.markdown


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


# -- the head ----------------------------------------------------------------------------------------------------------
def case_table(entry: dict[str, Any]) -> str:
    title = entry["title"][0].upper() + entry["title"][1:]
    below = "".join(f"<br>{note}" for note in report.notes(entry))
    shown = table(report.HEADER, report.rows_of(entry))
    return f"**{title}**\n\n{shown}" + (f"\n\n<sub>{below.removeprefix('<br>')}</sub>" if below else "")


def head(record: Record, source: str) -> str:
    return "\n\n".join([*(case_table(entry) for entry in record["cases"]), made_by(record, source)])


def holds(found: Found) -> str:
    """Asked against measured: the newest records that were measured at full size, or the bare questions."""
    rows, records = [], []
    for kind, lines in (("must_hold", asked.CPU), ("gpu", asked.GPU)):
        mine = [(source, r) for source, r in found if r["bench"] == kind and full(r)]
        records += mine
        wanted = {(line.shape, line.text) for line in lines}
        shown = [row for _, r in mine for row in r["lines"] if (row["shape"], row["line"]) in wanted]
        rows += [asked.shown(row) for row in shown or [line.row(None) for line in lines]]
    parts = [table(["the head", "shape", "asked", "measured", ""], rows)]
    parts += [f"{made_by(r, source)}<br><sub>{where(r)}</sub>" for source, r in records]
    if not any(r["bench"] == "gpu" for _, r in records):
        parts.append("GPU (bfloat16) rows: not measured; `python bench/gpu.py` measures them in under 9 minutes.")
    return "\n\n".join(parts)


def full(record: Record) -> bool:
    return record.get("scale", 1) == 1 and record.get("measured", True)


def pictures(found: Found) -> str:
    parts = [f"![{text}](docs/{name})" for name, text in PLOTS.items() if (ROOT / "docs" / name).exists()]
    swept = [(source, r) for source, r in found if r["bench"] == "sweep" and full(r)]
    return "\n\n".join(["\n".join(parts), *(f"{made_by(r, source)}<br><sub>{where(r)}</sub>" for source, r in swept)])


def every_case(found: Found) -> str:
    """All tables of the records behind `holds`, and the tile search's, for docs/benchmarks.md."""
    parts = []
    for source, record in found:
        if record["bench"] == "must_hold" and full(record):
            parts += [case_table(entry) for entry in record["cases"]] + [f"{made_by(record, source)}"]
        if record["bench"] == "gpu" and full(record):
            rows = [row for phase in record["phases"].values() for row in phase["rows"]]
            parts += [case_table(row) for row in rows if "contenders" in row] + [tile_table(rows)]
            parts.append(made_by(record, source))
    text = "\n\n".join(parts) or "No record yet: not measured."
    return text.replace("(bench/results/", "(../bench/results/")


def tile_table(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in (r for r in rows if "tile" in r):
        figures = [f"{row['median_s'] * 1e3:.3f} ms", f"{row['rate']:.4g} {row['unit']}"] if "rate" in row else ["", ""]
        cells.append([row["kernel"], row["shape"], f"`{row['tile']}`", *figures, row.get("not_run", "")])
    return table(["kernel", "shape", "tile", "time", "rate", ""], cells)


# -- the trainer and the rest ------------------------------------------------------------------------------------------
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


def drop_in(record: Record, source: str) -> str:
    """A TRL script as it is, and with one line more."""
    rows = []
    for kind, result in record["trainers"].items():
        theirs, mine = result["contenders"]["unpatched"], result["contenders"]["patched"]
        sampling = f", {mine['generation_s']:.2f} s of it generation" if mine["generation_s"] else ""
        times = [f"{theirs['median_s']:.2f} s", f"{mine['median_s']:.2f} s ({result['speedup']:.1f}x faster{sampling})"]
        peaks = [mib(row["peak_over_model_mib"]) for row in (theirs, mine)]
        rows.append([f"{kind.upper()}Trainer", *times, *peaks, f"{result['largest_loss_gap']:.0e}"])
    header = ["TRL " + record["environment"]["versions"].get("trl", ""), "step", "patched"]
    header += ["peak over the loaded model", "patched", "losses apart"]
    return f"**`fastrl.integrations.trl.patch(trainer)`**. {made_by(record, source)}\n\n{table(header, rows)}"


def memory(record: Record, source: str) -> str:
    """The sweep over lengths, and what is asked of the step."""
    rows, failed = [], {}
    for point in record["points"]:
        for name, row in point["contenders"].items():
            if "not_run" in row:
                failed.setdefault((name, row["not_run"]), []).append(f"{point['stage']} at {point['length']:,}")
                continue
            peak, speed = mib(row["peak_over_model_mib"]), f"{row['tokens_per_s']:,.0f} tokens/s"
            rows.append([point["stage"], f"{point['length']:,}", NAMES.get(name, name), peak, speed])
    parts = [f"**Updates against sequence length.** {made_by(record, source)}"]
    if record["lines"]:
        verdicts = {True: "holds", False: "missed", None: ""}
        asked_rows = [
            [line["line"], line["asked"], "not measured" if line["measured"] is None else f"{line['measured']:g}",
             verdicts[line["held"]]] for line in record["lines"]
        ]  # fmt: skip
        parts.append(table(["the step", "asked", "measured", ""], asked_rows))
    if rows:
        parts.append(table(["stage", "tokens of a sequence", "", "peak over the loaded model", "speed"], rows))
    for (name, why), points in failed.items():
        where_ = "at every point" if len(points) == len(record["points"]) else ", ".join(points)
        parts.append(f"{NAMES.get(name, name)} did not run, {where_}: `{why}`")
    return "\n\n".join(parts)


def shared_prompts(record: Record, source: str) -> str:
    """A GRPO update with one copy of each prompt, against a copy for every completion."""
    peaks, rows = record["peak_mib"], []
    for part in ("body", "update"):
        row = record[part]
        times = [f"{row[name]['median_s']:.2f} s" for name in ("unshared", "shared")]
        verdict = "holds" if row["holds"] else "missed"
        rows.append([part, *times, f"{row['speedup']:.2f}x", f">= {row['asked']:g}x", verdict])
    rows.append(["peak of the update", mib(peaks["unshared"]), mib(peaks["shared"]), "", "", ""])
    title = (
        f"**Shared prompts.** {record['completions']} completions of {record['completion_tokens']} tokens to each of "
        f"{record['prompts']} prompts of {record['prompt_tokens']}, fp32; the largest difference of a log-prob is "
        f"{record['largest_differences']['logprobs']:.0e}."
    )
    header = ["GRPO update", "a copy each", "one copy", "", "asked", ""]
    return f"{title} {made_by(record, source)}\n\n{table(header, rows)}"


def short_of_memory(found: Found) -> str:
    """What is asked of the trainer's memory and speed, in a few lines for the README."""
    rows, made = [], {}
    verdicts = {True: "holds", False: "missed", None: ""}
    for source, record in found:
        if record["bench"] == "memory" and full(record):
            rows += [[x["line"], x["asked"], f"{x['measured']:g}", verdicts[x["held"]]] for x in record["lines"]]
        elif record["bench"] == "shared_prompts":
            for part in ("body", "update"):
                line = f"GRPO {part}, 8 completions share a prompt of 400 tokens: times faster"
                row = record[part]
                rows.append([line, f">= {row['asked']:g}", f"{row['speedup']:g}", verdicts[row["holds"]]])
        elif record["bench"] == "plan_check" and full(record):
            worst = max(abs(case["error"]) for case in record["cases"])
            line = f"`fastrl plan` against the measured peak, worst of {len(record['cases'])} runs"
            limit = record["limit"]
            rows.append([line, f"<= {limit:.0%}", f"{worst:.1%}", verdicts[worst <= limit]])
        else:
            continue
        made.setdefault(where(record), []).append(made_by(record, source))
    if not rows:
        return ""
    below = [f"{', '.join(all_made)}<br><sub>{place}</sub>" for place, all_made in made.items()]
    return "\n\n".join([table(["a step of the trainer, on the CPU", "asked", "measured", ""], rows), *below])


def gemms(record: Record, source: str) -> str:
    """The native product beside torch's."""
    rows = []
    for row in record["rows"]:
        shape = f"[{row['m']}, {row['k']}] [{row['k']}, {row['n']}]"
        both = [f"{row[who]['gflops']:.0f} GFLOP/s" for who in ("torch", "own")]
        rows.append([row["product"], shape, *both, f"{row['speedup']:.2f}x"])
    return f"{made_by(record, source)}\n\n{table(['product', 'shape', 'torch', 'native', ''], rows)}"


def plan_check(record: Record, source: str) -> str:
    """`fastrl plan` against measured peaks."""
    rows = [
        [row["case"], f"{row['tokens']:,}", mib(row["measured_mib"]), mib(row["planned_mib"]),
         "?" if row["error"] is None else f"{row['error']:+.1%}", row["phase"]] for row in record["cases"]
    ]  # fmt: skip
    header = ["run", "tokens of a micro-batch", "measured peak", "planned", "off by", "largest phase"]
    slope = record.get("kib_a_token")
    said = f" Slope: {slope['measured']:g} KiB a token measured, {slope['planned']:g} planned." if slope else ""
    return f"**Plan against measured.**{said} {made_by(record, source)}\n\n{table(header, rows)}"


def long_context(record: Record, source: str) -> str:
    """The longest context under each cap, switch by switch."""
    rows = []
    for row in record["rungs"]:
        reached = f"{row['tokens']:,}" if "tokens" in row else row["not_run"]
        wanted = "" if row["asked"] is None else f"{row['asked']:,}"
        verdict = {True: "holds", False: "missed", None: ""}[row.get("held")]
        planned = f"{row['planned_tokens']:,}" if "planned_tokens" in row else ""
        rows.append([row["shape"], row["stage"], f"{row['cap']:g} GiB", row["name"], wanted, reached, planned, verdict])
    header = ["shape", "update", "cap", "switches", "asked", "longest sequence", "planned", ""]
    return f"**Longest context on one GPU.** {made_by(record, source)}\n\n{table(header, rows)}"


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


def loss_costs(record: Record, source: str) -> str:
    """Every loss over the plain NLL, dearest first."""
    rows = []
    for row in sorted(record["losses"], key=lambda row: -row["times_nll"]):
        allowed = row["allowed"]
        verdict = "" if allowed is None else "holds" if row["times_nll"] <= allowed else "missed"
        limit = "" if allowed is None else f"<= {allowed:g} x"
        rows.append([row["loss"], row["scope"], f"{row['times_nll']:.3f} x", limit, verdict])
    made = made_by(record, source).replace("(bench/results/", "(../bench/results/")
    header = ["loss", "scope", "time over NLL", "asked", ""]
    return f"{table(header, rows)}\n\n{made}<br><sub>{where(record)}</sub>"


def quickstart(record: Record, source: str) -> str:
    rows = []
    for run in record["runs"]:
        shown = [f"{run['accuracy'][name]:.1%}" for name in ("before", "after SFT", "after GRPO")]
        rows.append([str(run["seed"]), *shown, f"{run['seconds']:.0f} s"])
    again = "the same numbers" if record["same_seed_same_numbers"] else "OTHER numbers"
    text = f"{record['runs'][0]['prompts']} sums, greedy, exact match. Seed {record['runs'][0]['seed']} again: {again}."
    header = ["seed", "before", "after SFT", "after GRPO", "whole command"]
    return f"{table(header, rows)}\n\n{text} {made_by(record, source)}"


def each(kinds: dict[str, Callable[[Record, str], str]]) -> Callable[[Found], str]:
    """Every record of these kinds, in the order of the kinds, then by file name."""

    def make(found: Found) -> str:
        parts = []
        for kind, maker in kinds.items():
            rows = [(source, r) for source, r in found if r["bench"] == kind]
            parts += [f"{maker(r, source)}\n\n<sub>{where(r)}</sub>" for source, r in rows]
        return "\n\n".join(parts)

    return make


def measured_only(kinds: dict[str, Callable[[Record, str], str]]) -> Callable[[Found], str]:
    """As `each`, for a page in docs/, of records that are no rehearsals."""

    def make(found: Found) -> str:
        text = each(kinds)([(source, r) for source, r in found if full(r)])
        return text.replace("(bench/results/", "(../bench/results/") or "No record yet: not measured."

    return make


PAGES: dict[str, dict[str, Callable[[Found], str]]] = {
    "README.md": {
        "quickstart": each({"quickstart": quickstart}),
        "short": short_of_memory,
        "holds": holds,
        "pictures": pictures,
        "bench": each({"head": head, "trainer_vs_trl": trainer, "exactness": exactness}),
        "drop_in": each({"drop_in": drop_in}),
    },
    "docs/benchmarks.md": {"cases": every_case, "losses": each({"losses": loss_costs})},
    "docs/kernels.md": {"gemm": measured_only({"gemm": gemms})},
    "docs/memory.md": {
        "plan": measured_only({"plan_check": plan_check}),
        "sweep": measured_only({"memory": memory, "shared_prompts": shared_prompts}),
        "context": measured_only({"long_context": long_context}),
    },
}


# -- pages -------------------------------------------------------------------------------------------------------------
def records(results: Path) -> Found:
    found = [(path.name, json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    return [(name, r) for name, r in found if isinstance(r, dict) and "bench" in r]


def replace_between(text: str, body: str, block: str, name: str = "README.md") -> str:
    """`text` with `body` between the block's markers. Raises ValueError unless each stands there once, in order."""
    begin, end = f"<!-- {block}:begin -->", f"<!-- {block}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{name} must hold {begin} and then {end}, once each; add the two lines where the tables go")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{body}\n{end}{rest.split(end)[1]}" if body else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="where the pages stand")
    parser.add_argument("--results", type=Path, default=common.RESULTS)
    args = parser.parse_args()
    found, stale = records(args.results), []
    for page, blocks in PAGES.items():
        path = args.root / page
        text = path.read_text(encoding="utf-8")
        wanted = text
        for block, make in blocks.items():
            wanted = replace_between(wanted, make(found), block, page)
        if args.check:
            stale += [page] * (wanted != text)
        else:
            path.write_text(wanted, encoding="utf-8")
    if stale:
        print(f"{', '.join(stale)}: not what bench/results says; run: python bench/tables.py", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
