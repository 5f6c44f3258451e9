"""Checkpoints that move between numbers of processes, and what happens when a disk, a rank or a user stops one."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks, tell
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fastrl.train import checkpoint, loop, output_dir, run, workbench
from fastrl.train import config as configs
from fastrl.train.checkpoint import (
    CheckpointError,
    find_checkpoint,
    is_complete,
    load_checkpoint,
    save_checkpoint,
    saved_parts,
)
from fastrl.train.durable import read_json
from fastrl.train.metrics import MetricsLogger
from fastrl.train.optim import build_optimizer
from fastrl.train.optim_state import META, StateFiles, pack_optimizer
from fastrl.train.output_dir import start_run
from fastrl.train.parallel import World, joined
from fastrl.train.together import RankError, together
from fastrl.train.workbench import build

SHARED = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "warmup_steps": 3}
CASES = {  # name -> (stage, options); 19 words and 5 norm weights leave uneven rows on 2 and 4 ranks
    "sft": ("sft", {"per_device_train_batch_size": 5, "max_tokens_per_device": 40}),
    "kahan": ("sft", {"model": "untied", "dtype": "bfloat16", "bf16_update": "kahan"}),
    "eight": ("sft", {"model": "wide", "optim": "adamw_torch_8bit", "per_device_train_batch_size": 3}),
    "dpo": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 1, "per_device_train_batch_size": 3}),
    # the checkpoint falls between two updates on one rollout: samples and their numbers have to come back
    "grpo": (
        "grpo",
        {
            "per_device_train_batch_size": 8,
            "num_generations": 4,
            "max_completion_length": 5,
            "steps_per_generation": 3,
            "gradient_accumulation_steps": 1,
            "save_steps": 2,
            "beta": 0.05,
        },
    ),
    "ppo": ("ppo", {"per_device_train_batch_size": 4, "max_completion_length": 5, "num_ppo_epochs": 3}),
}
EXACT = ("sft", "dpo", "grpo")  # go on as one process would
AGAIN = ("sft", "kahan", "eight", "ppo")  # are read and written again without a step in between
FOUR = ("sft", "dpo", "ppo")  # on 4 ranks too
MESH = {"dpo": {"sharding": "hybrid", "shard_size": 2}, "ppo": {"sharding": "none"}}  # on 4 ranks
FROM = {1: (2, 4), 2: (1,), 4: (1, 2)}  # ranks that resume -> ranks that saved
REWARDS = """
def closeness(prompts, completions, answer, **columns):
    return [sum(x == y for x, y in zip(c, a)) - 0.1 * len(c) for c, a in zip(completions, answer)]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("moving")
    tiny.make_model(root / "model", vocab_size=23)
    tiny.make_model(root / "untied", tie_word_embeddings=False)
    tiny.make_model(root / "wide", hidden_size=64, intermediate_size=136)
    (root / "rewards.py").write_text(REWARDS)
    columns = ("prompt", "completion", "answer", "chosen", "rejected")
    rows = {"sft": columns[:2], "dpo": ("prompt", *columns[3:]), "grpo": ("prompt", "answer")}
    for stage, names in rows.items():
        tiny.write(root / stage / "train.jsonl", tiny.sums(20, 1), names)
    return root


def config_of(name: str, root: Path, out: Path, ranks: int = 1, **more):
    stage, options = CASES[name]
    options = {**SHARED, **options}
    model, data = options.pop("model", "model"), "grpo" if stage == "ppo" else stage
    paths = {"model_name_or_path": str(root / model), "dataset_name": str(root / data), "output_dir": str(out)}
    if data == "grpo":
        paths["reward_funcs"] = [f"{root / 'rewards.py'}:closeness"]
    mesh = MESH.get(name, {}) if ranks == 4 else {}
    return configs.CONFIGS[stage](**{**options, **paths, **mesh, **more})


# -- what the ranks do -------------------------------------------------------------------------------------------------
def run_all(root: Path, ranks: int) -> None:
    """Every case from the start; then again from the checkpoint that other numbers of ranks have left, and saved as it
    was read."""
    loop.plot_run = lambda path: None
    for name in FOUR if ranks == 4 else CASES:
        run(config_of(name, root, root / f"on-{ranks}" / name, ranks))
    for others in FROM[ranks] if ranks > 1 else ():  # one process resumes when all have saved
        resume_all(root, ranks, others)
    if ranks == 2:
        again(root, "sft", 2, 2)
        refused(root)
        stopped(root)
        twice(root)


def resume_all(root: Path, ranks: int, others: int) -> None:
    for name in of(EXACT, ranks, others):
        at = str(root / f"on-{others}" / name / "checkpoint-2")
        run(config_of(name, root, root / f"{others}-to-{ranks}" / name, ranks, resume_from_checkpoint=at))
    for name in of(AGAIN, ranks, others):
        again(root, name, ranks, others)


def of(names: tuple[str, ...], *ranks: int) -> list[str]:
    return [name for name in names if 4 not in ranks or name in FOUR]


def again(root: Path, name: str, ranks: int, others: int) -> None:
    """Read a checkpoint and write it without a step in between; each rank tells its notes and its random state."""
    at = str(root / f"on-{others}" / name / "checkpoint-2")
    config = config_of(name, root, root / f"{others}-to-{ranks}-again" / name, ranks, resume_from_checkpoint=at)
    with joined(config) as world, start_run(config, world) as begun:
        bench = build(config, begun, world)
        optimizer, named = build_optimizer(bench.model, config), list(bench.model.named_parameters())
        notes = begun.resume.restore(optimizer, named, world=world)
        told = {"notes": notes, "random": torch.get_rng_state().tolist()}
        (begun.path / f"told-{world.rank}").write_text(json.dumps(told))
        save_checkpoint(begun.path, begun.resume.state, bench.save_model, optimizer, named, world=world)


class Refusing:
    """`what` of `module` raises ENOSPC on one rank, from its `after`-th call on."""

    def __init__(self, module, what: str, rank: int, after: int = 1):
        self.module, self.what, self.own = module, what, getattr(module, what)
        self.calls, self.after, self.here = 0, after, os.environ["RANK"] == str(rank)

    def __enter__(self):
        setattr(self.module, self.what, self)

    def __exit__(self, *_):
        setattr(self.module, self.what, self.own)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.here and self.calls >= self.after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.own(*args, **kwargs)


REFUSALS = {"manifest": ("write_manifest", 0), "state": ("save_file", 1), "begin": ("_check_space", 0)}


def refused(root: Path) -> None:
    """Disks that refuse on one rank: every rank hears of it, training goes on, the first checkpoint stays."""
    for name, (what, rank) in REFUSALS.items():
        out = root / "refused" / name
        with Refusing(checkpoint, what, rank, after=3 if what == "save_file" else 2):  # of the second save
            result = run(config_of("sft", root, out, save_steps=1, max_steps=3))
        assert result.steps == 3
    with Refusing(workbench, "save_pretrained", 0):
        tell(root, "saver", lambda: run(config_of("sft", root, root / "refused" / "saver", save_strategy="no")))


def stopped(root: Path) -> None:
    """A signal that reaches rank 1 alone, in the middle of step 2."""
    own = MetricsLogger.end_step

    def signalled(self, step, *args):
        if step == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return own(self, step, *args)

    MetricsLogger.end_step = signalled
    result = run(config_of("sft", root, root / "stopped", save_strategy="no"))
    MetricsLogger.end_step = own
    (root / f"stopped-{os.environ['RANK']}").write_text(f"{result.steps} {result.interrupted}")


def twice(root: Path) -> None:
    """A second run in a directory that holds one; a directory that one rank does not see; an error on one rank."""
    tell(root, "twice", lambda: run(config_of("sft", root, root / "stopped")))
    own = output_dir._see

    def blind(path, world):
        own(path / "elsewhere" if world.rank == 1 else path, world)

    output_dir._see = blind
    tell(root, "blind", lambda: run(config_of("sft", root, root / "blind")))
    output_dir._see = own
    rank = int(os.environ["RANK"])
    world = World(rank, 2)
    tell(root, "plain", plain_state)
    tell(root, "odd", lambda: together(world, lambda: 1 // (1 - rank), (CheckpointError,)))


def plain_state() -> None:
    """An optimizer that keeps this rank's rows in a tensor that does not say so."""
    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(0)]))
    optimizer = torch.optim.AdamW([p])
    optimizer.state[p] = {"exp_avg": torch.zeros(2, 3)}
    pack_optimizer(optimizer, [("w", p)])


def killed(root: Path) -> None:
    """Rank 1 dies in the middle of its second save."""
    loop.plot_run = lambda path: None
    own, calls = checkpoint._write_own_state, []

    def dying(*args):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        own(*args)

    checkpoint._write_own_state = dying
    run(config_of("sft", root, root / "killed", save_steps=1, save_total_limit=1))


# -- tests -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def runs(place) -> Path:
    plot = loop.plot_run
    run_all(place, 1)
    for ranks in (2, 4):
        run_ranks(ranks, run_all, place, ranks)
    for others in FROM[1]:
        resume_all(place, 1, others)
    loop.plot_run = plot
    return place


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def states(path: Path) -> dict[str, torch.Tensor]:
    """The whole optimizer of a checkpoint, whoever saved it."""
    plain = read_json(path / "training_state" / "optimizer.json")
    files = StateFiles(saved_parts(path / "training_state", "optimizer"), plain["parameters"])
    rows = {name: (described["shape"] or [1])[0] for name, described in plain["parameters"].items()}
    made = {f"{kind}/{name}": files.read(kind, name, 0, rows[name])[0] for kind, name in files.states()}
    return made | {key: torch.tensor(float(value)) for key, value in plain["scalars"].items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def moves(names: tuple[str, ...]) -> list[tuple[str, int, int]]:
    return [(name, a, b) for b, sources in FROM.items() for a in sources for name in of(names, a, b)]


@pytest.mark.parametrize(("name", "saved", "resumed"), moves(AGAIN))
def test_weights_and_optimizer_come_back_bitwise(name, saved, resumed, runs):
    before = runs / f"on-{saved}" / name / "checkpoint-2"
    after = runs / f"{saved}-to-{resumed}-again" / name / "checkpoint-2"
    assert same(states(before), states(after)) and len(states(before)) > 10
    for inside in [p.relative_to(before) for p in before.rglob("model.safetensors")]:
        assert same(load_file(before / inside), load_file(after / inside))


@pytest.mark.parametrize(("name", "saved", "resumed"), moves(EXACT))
def test_training_goes_on_as_one_process_would(name, saved, resumed, runs):
    whole, rest = records(runs / "on-1" / name), records(runs / f"{saved}-to-{resumed}" / name)
    assert [r["step"] for r in rest] == [3, 4]
    for one, many in zip(whole[2:], rest, strict=True):
        for key in ("loss", "grad_norm", "learning_rate", "num_tokens", "reward"):
            assert (key in one) == (key in many)
            if key in one:
                assert many[key] == pytest.approx(one[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_lies_in_a_directory(ranks, runs):
    from transformers import AutoModelForCausalLM

    path = runs / f"on-{ranks}" / "sft" / "checkpoint-2"
    inner = {p.name for p in (path / "training_state").iterdir()}
    parts = [f"{i + 1:05d}-of-{ranks:05d}" for i in range(ranks)]
    kinds = ("optimizer-{}.safetensors", "rng-{}.safetensors", "rng-{}.json")
    assert inner == {"optimizer.json", *(kind.format(part) for kind in kinds for part in parts)}
    assert {p.suffix for p in path.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".yaml", ".jinja", ".txt"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    held = load_file(path / "model.safetensors")
    assert all(torch.equal(p, held[n]) for n, p in model.named_parameters())
    sizes = [sum(x.numel() for x in load_file(path / "training_state" / f"optimizer-{p}.safetensors").values())
             for p in parts]  # fmt: skip
    whole = sum(x.numel() for x in states(path).values())
    assert max(sizes) < 1.3 * whole / ranks, "each rank writes its share"
    alone = {p.name for p in (runs / "on-1" / "sft" / "checkpoint-2" / "training_state").iterdir()}
    assert alone == {"optimizer.json", "optimizer.safetensors", "rng.json", "rng.safetensors"}


def test_copies_are_written_once(runs):
    """Two copies of two halves each, and four whole ones."""
    counts = {name: len(saved_parts(runs / "on-4" / name / "checkpoint-2" / "training_state", "optimizer"))
              for name in ("sft", "dpo", "ppo")}  # fmt: skip
    assert counts == {"sft": 4, "dpo": 2, "ppo": 1}


def test_each_rank_has_its_own_random_numbers(runs):
    def told(move: str, rank: int) -> dict:
        return json.loads((runs / f"{move}-again" / "sft" / f"told-{rank}").read_text())

    saved = [load_file(p)["torch"].tolist()
             for p in saved_parts(runs / "on-2" / "sft" / "checkpoint-2" / "training_state", "rng")]  # fmt: skip
    assert saved[0] != saved[1]
    assert [told("2-to-2", r)["random"] for r in (0, 1)] == saved
    assert [told("2-to-4", r)["random"] for r in (0, 1)] == saved
    new = [told("2-to-4", r)["random"] for r in (2, 3)]
    assert new[0] != new[1] and all(x not in saved for x in new)
    assert told("2-to-2", 0)["notes"] == [] and told("4-to-1", 0)["notes"] == []
    assert "random generators of 2 of the 4 processes" in told("2-to-4", 0)["notes"][0]


def test_rows_of_another_rank_would_show(runs, tmp_path):
    """A planted mistake: two files that each say to hold the rows of the other."""
    path = runs / "on-2" / "sft" / "checkpoint-2"
    plain, good = read_json(path / "training_state" / "optimizer.json"), states(path)
    parts = saved_parts(path / "training_state", "optimizer")
    layouts = StateFiles(parts, plain["parameters"]).layouts
    for part, layout, other in zip(parts, layouts, layouts[::-1], strict=True):
        told = {META: json.dumps({**layout, "rows": other["rows"]})}
        save_file(load_file(part), tmp_path / part.name, told)
    files = StateFiles([tmp_path / part.name for part in parts], plain["parameters"])
    even = [n for n, described in plain["parameters"].items() if described["shape"][0] % 2 == 0]
    assert even and not any(
        torch.equal(files.read("exp_avg", n, 0, plain["parameters"][n]["shape"][0])[0], good[f"exp_avg/{n}"])
        for n in even
    )


def test_a_state_that_nobody_could_cut_is_refused(runs):
    for rank in (0, 1):
        assert "exp_avg of w is a plain tensor of this rank's rows" in (runs / f"plain-{rank}").read_text()


# -- disks, signals, kills ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", REFUSALS)
def test_a_disk_that_refuses_on_one_rank_is_heard_of_on_all(name, runs):
    """All ranks went on to the end; the first checkpoint is whole, and nothing half-written stays."""
    out = runs / "refused" / name
    assert is_complete(out / "checkpoint-1") and (out / "model.safetensors").exists()
    assert not (out / "checkpoint-2").exists() and not list(out.glob(".t*"))


def test_a_last_save_that_fails_raises_on_all_ranks(runs):
    told = [(runs / f"saver-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] and told[0].startswith("CheckpointError: could not save the model")
    assert not (runs / "refused" / "saver" / "config.json").exists()


def test_a_signal_to_one_rank_stops_all_after_the_same_step(runs):
    assert [(runs / f"stopped-{rank}").read_text() for rank in (0, 1)] == ["2 True"] * 2
    assert find_checkpoint(runs / "stopped", "auto").state.step == 2


def test_the_directory_is_decided_on_once(runs):
    for name, words in (("twice", "OutputDirError: .* already holds a run"), ("blind", "OutputDirError: .* rank 1")):
        told = [(runs / f"{name}-{rank}").read_text() for rank in (0, 1)]
        assert told[0] == told[1] and re.search(words, told[0])
    odd = [(runs / f"odd-{rank}").read_text() for rank in (0, 1)]
    assert odd[1].startswith("ZeroDivisionError") and odd[0].startswith(f"{RankError.__name__}: rank 1 failed: Zero")


def test_kill_9_of_a_rank_during_a_save_leaves_the_one_before(place):
    with pytest.raises(AssertionError):
        run_ranks(2, killed, place)
    out = place / "killed"
    assert load_checkpoint(out / "checkpoint-1").state.step == find_checkpoint(out, "auto").state.step == 1
    assert not (out / "checkpoint-2").exists()
