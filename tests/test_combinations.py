"""The table of what goes together is true: a step is trained in every cell that says yes, the others are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks

from fastrl.models import check
from fastrl.train import combinations, loop, run
from fastrl.train import config as configs
from fastrl.train.combinations import LATER, SWITCHES, Facts, Rule, check_model, refusal
from fastrl.train.flags import ConfigError

ROOT = Path(__file__).resolve().parents[1]
REWARDS = "def length(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
DATA = {"reward": "dpo", "rloo": "grpo", "ppo": "grpo", "distill": "sft"}
ONLINE = {"max_completion_length": 4}
OPTIONS = {"grpo": ONLINE | {"beta": 0.1}, "rloo": ONLINE, "ppo": ONLINE, "distill": {"max_new_tokens": 4}}
HERE = [name for name, switch in SWITCHES.items() if switch.ranks == 1]
TOGETHER = [name for name, switch in SWITCHES.items() if switch.ranks == 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("combinations")
    tiny.make_model(root / "model", num_hidden_layers=1)
    tiny.make_model(root / "teacher", seed=3, num_hidden_layers=1)
    tiny.make_data(root)
    rows = tiny.sums(12, 4)
    for i, row in enumerate(rows):
        row |= {"label": i % 3 > 0, "completions": [row["answer"], "1+1"], "labels": [True, False]}
    tiny.write(root / "kto" / "train.jsonl", rows, ("prompt", "completion", "label"))
    tiny.write(root / "prm" / "train.jsonl", rows, ("prompt", "completions", "labels"))
    (root / "rewards.py").write_text(REWARDS)
    return root


def config_of(place: Path, out: Path, stage: str, *switches: str, **more):
    paths = {"model_name_or_path": place / "model", "dataset_name": place / DATA.get(stage, stage), "output_dir": out}
    flags = {name: str(path) for name, path in paths.items()} | combinations.NEEDS.get(stage, {})
    if "reward_funcs" in flags:
        flags["reward_funcs"] = [f"{place}/rewards.py:length"]
    if "teacher_model_name_or_path" in flags:
        flags["teacher_model_name_or_path"] = str(place / "teacher")
    flags |= {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "max_tokens_per_device": 40}
    flags |= {"save_strategy": "no", "learning_rate": 1e-3, **OPTIONS.get(stage, {})}
    for name in switches:
        flags |= SWITCHES[name].flags
    return configs.CONFIGS[stage](**{**flags, **more})


NOTES: list[str] = []


def lean(patch) -> None:
    """What a step does not need is left out, and its notes are kept."""
    patch(loop, "plot_run", lambda _: None)
    patch(loop, "save_final", lambda *_: None)
    patch(check, "check_parity", lambda *_: None)
    patch(loop.MetricsLogger, "note", lambda _, *texts: NOTES.extend(texts))


def installed(*switches: str) -> bool:
    extras = {SWITCHES[name].extra for name in switches} - {""}
    return all(importlib.util.find_spec(extra) for extra in extras)


def trains(place: Path, out: Path, stage: str, *switches: str) -> None:
    """One step with a finite loss; what this machine has no device or package for says so instead."""
    NOTES.clear()
    if not installed(*switches):
        with pytest.raises(ConfigError, match="pip install"):
            config_of(place, out, stage, *switches)
    elif any(SWITCHES[name].cuda for name in switches) and not torch.cuda.is_available():
        elsewhere(config_of(place, out, stage, *switches), *switches)
    else:
        result = run(config_of(place, out, stage, *switches))
        assert result.steps == 1
        assert torch.tensor(result.history[-1]["loss"]).isfinite()


def elsewhere(config, *switches: str) -> None:
    """A switch for GPUs is refused on the CPU by name, or said to do nothing there."""
    flags = [flag for name in switches if SWITCHES[name].cuda for flag in SWITCHES[name].flags]
    try:
        run(config)
    except ValueError as error:
        NOTES.append(str(error))
    assert any(flag in note for note in NOTES for flag in flags), (flags, NOTES)


# -- the cells -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", configs.CONFIGS)
def test_every_stage_with_every_switch(stage, place, tmp_path, monkeypatch):
    lean(monkeypatch.setattr)
    for i, name in enumerate(HERE):
        why = refusal(stage, name)
        if why is None:
            continue
        if why:
            with pytest.raises(ConfigError):
                config_of(place, tmp_path / str(i), stage, name)
        elif name != "torch_compile":  # slow: a test of its own
            trains(place, tmp_path / str(i), stage, name)


def pairs() -> set[tuple[str, str]]:
    """Pairs that sft accepts and that do something here, but for compiled ones."""
    names = [n for n in HERE if n != "torch_compile" and not SWITCHES[n].cuda and installed(n)]
    accepted = [n for n in names if refusal("sft", n) == ""]
    return {(a, b) for i, a in enumerate(accepted) for b in accepted[i + 1 :] if refusal("sft", a, b) == ""}


def covering() -> list[tuple[str, ...]]:
    """Sets of switches that go together, such that every accepted pair is in one of them."""
    left, made = pairs(), []
    names = sorted({name for pair in left for name in pair}, key=HERE.index)
    while left:
        chosen = list(min(left))
        for name in sorted(names, key=lambda n: -sum(n in pair for pair in left)):
            if name not in chosen and refusal("sft", *chosen, name) == "":
                chosen.append(name)
        made.append(tuple(chosen))
        left -= {(a, b) for a in chosen for b in chosen}
    return made


@pytest.mark.parametrize("part", range(3))
def test_every_two_switches_that_are_not_refused(part, place, tmp_path, monkeypatch):
    lean(monkeypatch.setattr)
    for i, switches in enumerate(covering()[part::3]):
        trains(place, tmp_path / str(i), "sft", *switches)


def test_the_sets_hold_every_pair():
    held = {(a, b) for switches in covering() for a in switches for b in switches}
    assert len(pairs()) > 100 and pairs() <= held


def test_compiled_layers_train_with_others(place, tmp_path, monkeypatch):
    lean(monkeypatch.setattr)
    others = [n for n in ("tiled_mlp", "LoRA", "muon") if refusal("sft", "torch_compile", n) == ""]
    assert others
    trains(place, tmp_path, "sft", "torch_compile", others[-1])


# -- two ranks -----------------------------------------------------------------------------------------------------
MESHES = ("sharding full", "sequence_parallel_size")


def cells_on_two() -> list[tuple[str, str, tuple[str, ...]]]:
    """(folder, stage, switches): every stage on every mesh, and sft on two meshes with every other switch."""
    cells = [(stage, (mesh,)) for stage in configs.CONFIGS for mesh in TOGETHER if not SWITCHES[mesh].cuda]
    single = [n for n in HERE if n != "torch_compile" and not SWITCHES[n].cuda and installed(n)]
    cells += [("sft", (name, mesh)) for mesh in MESHES for name in single]
    cells += [("sft", switches) for switches in LATER if len(switches) > 2]
    return [(str(i), stage, how) for i, (stage, how) in enumerate(cells) if refusal(stage, *how) == ""]


def on_two(place: Path, out: Path) -> None:
    lean(setattr)
    for folder, stage, switches in cells_on_two():
        if switches in LATER:
            with pytest.raises(ConfigError, match=LATER[switches]):
                trains(place, out / folder, stage, *switches)
        else:
            trains(place, out / folder, stage, *switches)


def test_every_stage_and_every_switch_on_two_ranks(place, tmp_path, monkeypatch):
    """The first step's loss is that of one process, where nothing but the mesh differs."""
    run_ranks(2, on_two, place, tmp_path)
    lean(monkeypatch.setattr)
    alone = {stage: run(config_of(place, tmp_path / stage, stage)).history[-1]["loss"] for stage in configs.CONFIGS}
    for folder, stage, switches in cells_on_two():
        if len(switches) == 1:
            lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1])["loss"] == pytest.approx(alone[stage], rel=1e-5, abs=1e-6), (stage, switches)


# -- the rules -----------------------------------------------------------------------------------------------------
def test_a_rule_names_the_flags_the_reason_and_what_works(place, tmp_path, monkeypatch):
    rule = Rule(("tiled_mlp", "bf16"), lambda c: c.tiled_mlp and c.bf16, "of no use together", "drop one")
    monkeypatch.setattr(combinations, "RULES", (rule,))
    config_of(place, tmp_path, "sft", "tiled_mlp")
    with pytest.raises(ConfigError, match="--tiled_mlp 3 --bf16 true: of no use together; drop one"):
        config_of(place, tmp_path, "sft", "tiled_mlp", "bf16")


def test_a_rule_about_flags_that_a_stage_lacks_is_not_read(place, tmp_path, monkeypatch):
    rule = Rule(("precompute_ref_log_probs",), lambda c: c.precompute_ref_log_probs, "no", "no")
    monkeypatch.setattr(combinations, "RULES", (rule,))
    combinations.check(config_of(place, tmp_path, "sft"))


def test_switches_of_several_ranks_are_said_to_do_nothing_on_one(place, tmp_path):
    told = check_model(config_of(place, tmp_path, "sft", "sharding none"), Facts())
    assert told == ["--sharding none does nothing on one process"]
    assert not check_model(config_of(place, tmp_path, "sft"), Facts())


# -- the page ------------------------------------------------------------------------------------------------------
def test_the_page_is_what_the_rules_say():
    page = (ROOT / "docs" / "combinations.md").read_text()
    assert page == combinations.page(), "python -m fastrl.train.combinations > docs/combinations.md"


def test_every_flag_of_memory_and_devices_is_a_switch():
    """A new flag has to find its place in the table."""
    from fastrl.train.configs import activations, adapters, optimizer, parallel

    classes = (activations.ActivationFlags, adapters.AdapterFlags, optimizer.OptimizerFlags, parallel.ParallelFlags)
    known = {f for cls in classes for f, info in cls.__dataclass_fields__.items() if info.type in ("bool",)}
    switched = {flag for switch in SWITCHES.values() for flag in switch.flags}
    assert known <= switched | NUMBERS, known - switched - NUMBERS


# variants of a switch, and what is done after the last step
NUMBERS = {"reshard_after_forward", "use_rslora", "use_bnb_nested_quant", "merge_adapters"}
