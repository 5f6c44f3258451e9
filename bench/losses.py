"""What each loss costs in the fused head, against the plain NLL's fused time on the same rows.

    python bench/losses.py                         every loss, about 6 minutes on two cores
    python bench/losses.py --names grpo,dpo --rounds 3 --out /tmp/x.json

fp32, forward and backward, 24 sequences (12 pairs, 8 groups) of equal length, random data and log-probs of the other
policies, loss numbers at their defaults. Each loss alternates with the NLL in one process; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import re

import common
import torch

import fastrl
from fastrl import losses
from fastrl.objective import scope_of

ROWS, HIDDEN, VOCABULARY, SEQUENCES = 1056, 256, 32768, 24
ALLOWED = {"token": 1.15}  # times the NLL; any other scope 1.5
NEEDED = {"dr_grpo": {"max_length": ROWS // SEQUENCES}}  # options without a default that runs
COLUMN = re.compile(r"batch\.(per_token|per_sequence)\['(\w+)'\]")


class Data:
    """hidden, weight, teacher and everything that a batch may hold."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.randn = lambda *shape: torch.randn(*shape, generator=g)
        self.hidden, self.weight = self.randn(ROWS, HIDDEN), self.randn(VOCABULARY, HIDDEN) * 2 / HIDDEN**0.5
        self.targets = torch.randint(VOCABULARY, (ROWS,), generator=g)
        with torch.no_grad():
            self.logprobs = fastrl.linear_logprobs(self.hidden, self.weight, self.targets).logprobs
        self.labels = torch.arange(SEQUENCES) % 2 == 0
        self.columns: dict[str, dict] = {"per_token": {}, "per_sequence": {}}

    def batch(self) -> fastrl.TokenBatch:
        other = [self.logprobs + 0.05 * self.randn(ROWS) for _ in range(3)]
        return fastrl.TokenBatch(
            self.targets,
            cu_seqlens=torch.arange(SEQUENCES + 1, dtype=torch.int32) * (ROWS // SEQUENCES),
            advantages=self.randn(ROWS),
            **dict(zip(("old_logprobs", "ref_logprobs", "rollout_logprobs"), other, strict=True)),
            labels=self.labels,
            group_ids=torch.arange(SEQUENCES) // 3,
            rewards=self.randn(SEQUENCES),
            margins=self.randn(SEQUENCES // 2),
            **self.columns,
        )

    def step(self, objective, batch):
        """One forward and backward; a column that the loss asks for by name is made, and the step begun again."""
        while True:
            hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()
            try:
                fastrl.fused_loss(objective, hidden, weight, batch, **self.more(objective)).loss.backward()
                return batch
            except ValueError as error:
                found = COLUMN.search(str(error))
                if found is None:
                    raise
                where, name = found.groups()
                size = ROWS if where == "per_token" else SEQUENCES
                self.columns[where][name] = column(name, size, self.randn)
                batch = batch.with_columns(**{where: {name: self.columns[where][name]}})

    def more(self, objective) -> dict:
        """A teacher for those that learn from one: another head over the same hidden states."""
        if "divergence" not in getattr(objective, "outputs", ()):
            return {}
        return {"teacher": fastrl.Teacher(self.hidden.flip(1).contiguous(), self.weight)}


def column(name: str, size: int, randn) -> torch.Tensor:
    """Words of a support, log-probs (at most 0), small integers for ids; anything else is a number in (0, 1)."""
    if "topk" in name:
        words = (torch.arange(8) * 97 + torch.arange(size)[:, None]) % VOCABULARY
        return (randn(size, 8).sigmoid() / 8).log() if "logprobs" in name else words
    if name.endswith("logprobs"):
        return -randn(size).abs() - 5
    if name.endswith(("ids", "id", "turn", "turns", "step", "steps")):
        return torch.arange(size) * 4 // size
    return randn(size).sigmoid()


def measured(name: str, data: Data, rounds: int, limit: float | None) -> dict:
    objective, plain = losses.get(name, **NEEDED.get(name, {})), losses.get("nll")
    batch = data.step(objective, data.batch())
    calls = {"nll": lambda: data.step(plain, batch), name: lambda: data.step(objective, batch)}
    seconds = common.alternate(calls, rounds, limit=limit)
    own, base = (common.summary(seconds[n])["median_s"] for n in (name, "nll"))
    scope = "divergence" if data.more(objective) else scope_of(objective)
    row = {"loss": name, "scope": scope, "median_s": own, "nll_s": base, "times_nll": round(own / base, 3)}
    return row | {"allowed": None if scope == "divergence" else ALLOWED.get(scope, 1.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", help="comma-separated; default: all that read log-probs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quiet", type=float, default=0.2, help="time again if others used this many cores; 0: never")
    parser.add_argument("--out", help="another file than bench/results/losses_cpu_float32.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows, data = [], Data()
    for name in args.names.split(",") if args.names else losses.names():
        if getattr(losses.law(name), "reads", "logprobs") != "logprobs":
            continue  # of scores and values: no head is involved
        rows.append(measured(name, data, args.rounds, args.quiet or None))
        shown = "-" if rows[-1]["allowed"] is None else f"{rows[-1]['allowed']:.2f}"
        print(f"{name:28s} {rows[-1]['scope']:10s} {rows[-1]['times_nll']:6.3f} x  (allowed {shown})", flush=True)
    record = {"bench": "losses", "command": common.command(), "rounds": args.rounds, "rows": ROWS, "hidden": HIDDEN}
    record |= {"vocabulary": VOCABULARY, "dtype": "float32", "environment": common.environment(args.threads)}
    print(common.write_json("losses_cpu_float32", {**record, "losses": rows}, args.out))


if __name__ == "__main__":
    main()
