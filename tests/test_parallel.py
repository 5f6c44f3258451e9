"""Stages on 1, 2 and 4 processes: the same losses, gradient norms and weights, whatever each rank holds."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from fastrl.train import config as configs
from fastrl.train import run

# A large epsilon: where a gradient is rounding alone, Adam's update would be noise of full size.
SHARED = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "max_grad_norm": 0.5, "adam_epsilon": 1e-3}
SHARED |= {"save_strategy": "no"}
# name -> (stage, options). Three sequences on four ranks leave one of them without a token.
CASES = {
    "sft": ("sft", {"per_device_train_batch_size": 7, "max_tokens_per_device": 24}),
    "sft_untied": ("sft", {"model": "untied", "per_device_train_batch_size": 3}),
    "sft_one_by_one": ("sft", {"per_device_train_batch_size": 5, "max_tokens_per_device": 1}),
    "sft_frozen_norms": (
        "sft",
        {"loss_type": "dft", "per_device_train_batch_size": 6, "gradient_checkpointing": False},
    ),
    "dpo": ("dpo", {"per_device_train_batch_size": 3, "max_tokens_per_device": 40}),
    "dpo_list": ("dpo", {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.1], "per_device_train_batch_size": 5}),
    "dpo_precomputed": ("dpo", {"precompute_ref_log_probs": True, "per_device_train_batch_size": 1}),
    "kto": ("kto", {"per_device_train_batch_size": 5, "max_tokens_per_device": 30}),
    "bco": ("kto", {"loss_type": "bco", "per_device_train_batch_size": 3}),
    "reward": ("reward", {"per_device_train_batch_size": 3, "max_tokens_per_device": 40}),
    "prm": ("prm", {"per_device_train_batch_size": 3}),
    "distill": ("distill", {"lmbda": 0.0, "per_device_train_batch_size": 3, "teacher_model_name_or_path": "teacher"}),
}
MESHES = {  # ranks -> how their weights are split, for each case in turn
    2: ({}, {"sharding": "none"}),
    4: ({}, {"sharding": "hybrid", "shard_size": 2}, {"reshard_after_forward": False}),
}


def rows(count: int, seed: int) -> list[dict]:
    draw, made = random.Random(seed), []
    for i in range(count):
        a, b = draw.randint(0, 9), draw.choice([draw.randint(0, 9), draw.randint(1000, 99999)])
        right, wrong = str(a + b), f"{a}{b} ?"
        made.append(
            {
                "sft": {"prompt": f"{a}+{b}=", "completion": right},
                "dpo": {"prompt": f"{a}+{b}=", "chosen": right, "rejected": wrong},
                "kto": {"prompt": f"{a}+{b}=", "completion": (wrong, right)[i % 2], "label": bool(i % 2)},
                "prm": {
                    "prompt": f"{a}+{b}=",
                    "completions": [right, wrong, right][: 1 + i % 3],
                    "labels": [True] * (1 + i % 3),
                },
            }
        )
    return made


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parallel")
    tiny.make_model(root / "model")
    tiny.make_model(root / "untied", tie_word_embeddings=False)
    tiny.make_model(root / "teacher", seed=3)
    made = rows(24, 1)
    for stage, of in {
        "sft": "sft",
        "dpo": "dpo",
        "kto": "kto",
        "reward": "dpo",
        "prm": "prm",
        "distill": "sft",
    }.items():
        (root / stage).mkdir()
        (root / stage / "train.jsonl").write_text("".join(json.dumps(row[of]) + "\n" for row in made))
    return root


def config_of(name: str, root: Path, out: Path, **mesh):
    stage, options = CASES[name]
    options = dict(options)
    model = root / options.pop("model", "model")
    if "teacher_model_name_or_path" in options:
        options["teacher_model_name_or_path"] = str(root / options["teacher_model_name_or_path"])
    paths = {"model_name_or_path": str(model), "dataset_name": str(root / stage), "output_dir": str(out)}
    return configs.CONFIGS[stage](**{**SHARED, **options, **paths, **mesh})


ON = {1: tuple(CASES), 2: ("sft", "dpo", "kto", "reward", "prm", "distill"), 4: tuple(CASES)}


def run_all(root: Path, out: Path, ranks: int) -> None:
    meshes = MESHES[ranks] if ranks > 1 else ({},)
    for i, name in enumerate(ON[ranks]):
        run(config_of(name, root, out / name, **meshes[i % len(meshes)]))


@pytest.fixture(scope="module")
def runs(place) -> dict[int, Path]:
    """The folder of the runs of every case on 1, 2 and 4 processes."""
    made = {n: place / f"on-{n}" for n in (1, 2, 4)}
    run_all(place, made[1], 1)
    for n in (2, 4):
        run_ranks(n, run_all, place, made[n], n)
    return made


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


TIMES = ("timing_s/", "perf/", "step_time")


@pytest.mark.parametrize(("ranks", "name"), [(n, name) for n in (2, 4) for name in ON[n]])
def test_a_run_is_the_same_on_any_number_of_processes(name, ranks, runs):
    alone, together = (records(runs[n] / name) for n in (1, ranks))
    assert len(alone) == len(together) == 2
    for one, many in zip(alone, together, strict=True):
        assert one.keys() == many.keys()
        for key in one:
            decided = key != "rewards/accuracies" or abs(one["rewards/margins"]) > 1e-6
            if not key.startswith(TIMES) and decided:  # the sign of a margin that is rounding alone says nothing
                assert many[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key
    a, b = (load_file(runs[n] / name / "model.safetensors") for n in (1, ranks))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key], rtol=1e-4, atol=1e-5)


def test_the_runs_compared_have_moved(place, runs):
    """Else equality would say nothing."""
    before = load_file(place / "model" / "model.safetensors")
    after = load_file(runs[4] / "sft" / "model.safetensors")
    assert max(float((before[k] - after[k]).abs().max()) for k in before) > 1e-3


def test_means_instead_of_sums_would_show(place, runs, tmp_path, monkeypatch):
    """A planted mistake: gradients averaged over the ranks change the gradient norm by their number."""
    run_ranks(2, averaged, place, tmp_path)
    one, many = records(runs[1] / "sft"), records(tmp_path / "sft")
    assert many[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"] / 2, rel=1e-4)


def averaged(root: Path, out: Path) -> None:
    from torch.distributed.fsdp import FSDPModule

    own = FSDPModule.set_gradient_divide_factor
    FSDPModule.set_gradient_divide_factor = lambda self, factor: own(self, 2.0)
    run(config_of("sft", root, out / "sft"))


# -- collectives ---------------------------------------------------------------------------------------------------
def collectives(root: Path) -> None:
    from types import SimpleNamespace

    from fastrl.train.parallel import joined

    flags = SimpleNamespace(
        use_cpu=True, distributed_timeout=60.0, sequence_parallel_size=2, sharding="full", shard_size=None
    )
    with joined(flags) as world:
        rank = world.rank
        assert (world.dp_rank, world.dp_size, world.sequence_rank) == (rank // 2, 2, rank % 2)
        assert world.gather({"r": rank, "x": 0.1 * rank}) == [{"r": r, "x": 0.1 * r} for r in range(4)]
        assert world.gather_data([rank]) == [[0], [2]]
        assert world.from_main("first" if rank == 0 else "other") == "first"
        own = torch.arange(float(world.dp_rank), dtype=torch.float64) + 10 * world.dp_rank
        assert world.everywhere(own).tolist() == [10.0]
        assert world.sums({"a": 1.0, str(world.dp_rank): 2.0}) == {"a": 2.0, "0": 2.0, "1": 2.0}


def test_what_ranks_tell_each_other(tmp_path):
    run_ranks(4, collectives, tmp_path)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"sequence_parallel_size": 3}, "does not divide the 4 processes"),
        ({"sharding": "hybrid", "shard_size": 3}, "does not divide the 4 processes"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(flags, told):
    from fastrl.train.configs.sft import SFTConfig
    from fastrl.train.flags import ConfigError
    from fastrl.train.parallel import mesh_of

    config = SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o", **flags)
    with pytest.raises(ConfigError, match=told):
        mesh_of(config, 4, "cpu")
