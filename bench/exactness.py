"""How exact the gradients are, and how little the cut into micro-batches matters: worst relative (L2) errors.

    python bench/exactness.py                  under a minute; writes results/exactness.json

gradients: every loss, fused, against autograd through materialised float64 logits, random upstream, both in float64.
cuts: one micro-batch against the same sequences one at a time in another order, every aggregation, fp64 and fp32.
saved_model: log-probs of a trained and saved model, fastrl against plain transformers, largest absolute difference.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import common
import torch
from torch import Tensor

import fastrl
from fastrl import losses
from fastrl.objective import AGGREGATES

LOSSES = {
    "nll": {},
    "reinforce": {"kl_coef": 0.1, "kl": "k1", "entropy_coef": 0.02},
    "ppo_clip": {"clip_high": 0.3, "dual_clip": 3.0, "kl_coef": 0.1, "kl": "k2"},
    "grpo": {"kl_coef": 0.1, "kl": "k3"},
    "dapo": {"entropy_coef": 0.01},
    "dr_grpo": {"max_length": 20},
    "dpo": {"label_smoothing": 0.1},
}
LENGTHS, HIDDEN, VOCABULARY = [5, 1, 9, 0, 7, 12], 24, 211


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """hidden [T, H], weight [V, H] and the fields of a batch of six ragged sequences."""
    torch.manual_seed(0)
    t = sum(LENGTHS)
    hidden = torch.randn(t, HIDDEN, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY, (t,))
    logprobs = torch.log_softmax(hidden @ weight.t(), -1).gather(1, targets[:, None]).squeeze(1)
    fields = {
        "advantages": torch.randn(t, dtype=torch.float64),
        "old_logprobs": logprobs + 0.2 * torch.randn(t, dtype=torch.float64),
        "ref_logprobs": logprobs + 0.2 * torch.randn(t, dtype=torch.float64),
    }
    fields = {name: x.to(dtype) for name, x in fields.items()}
    return hidden.to(dtype), weight.to(dtype), {"targets": targets, **fields}


def gradients(objective, hidden, weight, parts: list[list[int]], fields, aggregate=None, **options) -> list[Tensor]:
    """dH (in the original order) and dW over micro-batches `parts`, each a list of sequence numbers."""
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    tokens = torch.tensor([LENGTHS[0] + LENGTHS[1], LENGTHS[2] + LENGTHS[3], LENGTHS[4] + LENGTHS[5]])
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    for part in parts:
        rows = torch.tensor([r for s in part for r in range(starts[s], starts[s] + LENGTHS[s])], dtype=torch.long)
        batch = fastrl.TokenBatch(
            **{name: x[rows] for name, x in fields.items()},
            cu_seqlens=torch.tensor([0, *(LENGTHS[s] for s in part)]).cumsum(0),
            group_ids=groups[part],
            group_tokens=tokens[groups[part]],
            num_tokens=sum(LENGTHS),
            num_sequences=len(LENGTHS),
            num_groups=3,
        )
        out = fastrl.fused_loss(objective, h[rows], w, batch, aggregate=aggregate, **options)
        (out.loss * 1.7).backward()
    return [h.grad, w.grad]


def worst(got: list[Tensor], want: list[Tensor]) -> float:
    return max(float((g.double() - t.double()).norm() / t.double().norm()) for g, t in zip(got, want, strict=True))


def exactness() -> tuple[dict, dict]:
    exact, cuts = {}, {}
    whole = [list(range(len(LENGTHS)))]
    for name, options in LOSSES.items():
        objective = losses.get(name, **options)
        hidden, weight, fields = problem(torch.float64)
        truth = gradients(objective, hidden, weight, whole, fields, backend="reference", temperature=0.8)
        ours = gradients(objective, hidden, weight, whole, fields, temperature=0.8, workspace_bytes=VOCABULARY * 8 * 7)
        exact[name] = worst(ours, truth)
        apart = [[4, 5], [2, 3], [0, 1]] if name == "dpo" else [[3, 4], [5], [0], [2, 1]]
        modes = [m for m in AGGREGATES if m != "constant" or name == "dr_grpo"]
        for dtype in (torch.float64, torch.float32):
            data = problem(dtype)
            errors = [
                worst(
                    gradients(objective, *data[:2], apart, data[2], mode),
                    gradients(objective, *data[:2], whole, data[2], mode),
                )
                for mode in modes
            ]
            cuts[f"{name}, {str(dtype)[6:]}"] = max(errors)
    return exact, cuts


def saved_model_gap() -> float:
    """Train the quickstart's model for 20 steps, save it, and compare it in both libraries."""
    from transformers import AutoModelForCausalLM

    from fastrl.models import load_causal_lm
    from fastrl.quickstart.model import build_model
    from fastrl.quickstart.run import lay_out
    from fastrl.train import SFTConfig, run

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = lay_out(root / "data")
        start = build_model(root / "model")
        paths = {"model_name_or_path": start, "dataset_name": data / "sft", "output_dir": root / "o"}
        options = {"max_steps": 20, "learning_rate": 3e-3, "save_strategy": "no"}
        run(SFTConfig(**{name: str(path) for name, path in paths.items()}, **options))
        ids = torch.randint(3, 15, (60,), generator=torch.Generator().manual_seed(0))
        plain = AutoModelForCausalLM.from_pretrained(root / "o").eval()
        ours = load_causal_lm(root / "o").eval()
    with torch.no_grad():
        want = torch.log_softmax(plain(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None]).squeeze(1)
        hidden = ours.hidden(ids, torch.tensor([0, 60], dtype=torch.int32))
        got = ours.head(hidden[:-1], targets=ids[1:]).logprobs
    return float((got - want).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    args = parser.parse_args()
    exact, cuts = exactness()
    record = {
        "bench": "exactness",
        "command": common.command(),
        "environment": common.environment(threads=torch.get_num_threads()),
        "gradients": exact,
        "cuts": cuts,
        "saved_model": saved_model_gap(),
    }
    print(common.write_json("exactness", record, args.out))


if __name__ == "__main__":
    main()
