"""The README's Python runs as it stands there, and shows both commands and the measured tables."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import tiny
import torch

import fastrl

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_drop_in_and_the_own_objective_run(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.make_model(tmp_path))
    ids = torch.randint(2, 19, (1, 10))
    names = {
        "model": model,
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]]),
        "targets": ids[0].roll(-1),
        "mask": torch.tensor([True] * 5 + [False] + [True] * 3 + [False]),
        "cu_seqlens": torch.tensor([0, 6, 10], dtype=torch.int32),
        "advantages": torch.tensor([1.0, -0.5]),
        "old": torch.randn(10) - 3,
        "ref": torch.randn(10) - 3,
    }
    drop_in, own = (b for b in blocks("python") if "fastrl.fused_loss" in b)
    exec(drop_in, names)  # noqa: S102 - the README is ours
    assert model.lm_head.weight.grad.abs().sum() > 0 and {"kl", "entropy"} <= names["out"].metrics.keys()
    weight = model.lm_head.weight
    exec(own, names | {"fastrl": fastrl, "weight": weight, "hidden": names["hidden"].detach().requires_grad_()})
    assert len(drop_in.strip().splitlines()) <= 12


def test_the_reward_in_the_readme_is_a_reward():
    [source] = [b for b in blocks("python") if "def correct" in b]
    names: dict = {}
    exec(source, names)
    assert names["correct"](["1+1="] * 2, [" 2", "3"], answer=["2", "2"]) == [1.0, 0.0]


def test_the_commands_in_the_readme_have_flags_that_exist():
    from fastrl.train.config import CONFIGS

    text = " ".join(blocks("bash")).replace("\\\n", " ")
    commands = re.findall(r"fastrl (sft|dpo|grpo)((?: +--\w+ \S+)+)", text)
    assert {c for c, _ in commands} == {"sft", "dpo", "grpo"}
    for command, flags in commands:
        for flag in re.findall(r"--(\w+)", flags):
            assert flag in CONFIGS[command].__dataclass_fields__, (command, flag)


def test_the_tables_are_those_of_the_result_files():
    done = subprocess.run([sys.executable, ROOT / "bench" / "tables.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "make quickstart" in README and "make test" in README
