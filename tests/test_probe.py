"""The worst micro-batch before the first step: it is the worst, leaves no trace, and lowers the budget in time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from safetensors.torch import load_file

from fastrl.data.prefix import tokens_of
from fastrl.train import config as configs
from fastrl.train import loop, probe, run
from fastrl.train.budget import OutOfMemoryError
from fastrl.train.output_dir import Run
from fastrl.train.probe import Quiet, as_if_alone, ready, rehearse, state_bytes, worst_case
from fastrl.train.step import loss_of
from fastrl.train.workbench import build

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes (told by a test)"
REWARDS = "def length(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
STAGES = {
    "sft": ("sft", {"model": "dropout"}),
    "dpo": ("dpo", {}),
    "kto": ("kto", {}),
    "reward": ("dpo", {}),
    "prm": ("prm", {}),
    "grpo": ("grpo", {"num_generations": 4, "max_completion_length": 6, "beta": 0.1, "num_iterations": 2}),
    "rloo": ("grpo", {"num_generations": 2, "max_completion_length": 6}),
    "ppo": ("grpo", {"max_completion_length": 6}),
    "distill": ("sft", {"lmbda": 0.5, "max_new_tokens": 6}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("probe")
    tiny.make_model(root / "model")
    tiny.make_model(root / "dropout", attention_dropout=0.2)
    tiny.make_model(root / "teacher", seed=3)
    tiny.make_data(root)
    rows = tiny.sums(30, 4)
    for i, row in enumerate(rows):
        row |= {"label": i % 3 > 0, "completions": [row["answer"], "1+1"], "labels": [True, False]}
    tiny.write(root / "kto" / "train.jsonl", rows, ("prompt", "completion", "label"))
    tiny.write(root / "prm" / "train.jsonl", rows, ("prompt", "completions", "labels"))
    (root / "rewards.py").write_text(REWARDS)
    return root


def config_of(stage: str, place: Path, out: Path, **options):
    data, more = STAGES[stage]
    more = dict(more)
    shared = {
        "model_name_or_path": str(place / more.pop("model", "model")),
        "dataset_name": str(place / data),
        "output_dir": str(out),
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",  # AdamW's first steps follow the sign of the tiniest gradient, and so rounding
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
    }
    if data == "grpo":
        shared["reward_funcs"] = [f"{place}/rewards.py:length"]
    if stage == "distill":
        shared["teacher_model_name_or_path"] = str(place / "teacher")
    return configs.CONFIGS[stage](**{**shared, **more, **options})


def stage_of(name: str, place: Path, out: Path, **options):
    return build(config_of(name, place, out, **options), Run(out, None, [])).stage


# -- no trace ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_the_same_bit_for_bit(stage, place, tmp_path, monkeypatch, capfd):
    tried = []
    monkeypatch.setattr(probe, "rehearse", lambda *a: tried.append(1) or rehearse(*a))
    paths = [run(config_of(stage, place, tmp_path / str(x), probe_memory=x)).output_dir for x in (True, False)]
    assert tried == [1], "one of the runs was to be probed"
    a, b = (load_file(p / "model.safetensors") for p in paths)
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [[json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()] for p in paths]
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys() and one["loss"] == other["loss"] and one["num_tokens"] == other["num_tokens"]
    said = capfd.readouterr()
    assert "has its peak at" in (said.out + said.err).replace("\n", " ")


def test_a_probe_that_draws_would_show(place, tmp_path, monkeypatch):
    """A planted mistake: the random generators are not put back (the model has dropout)."""
    a = run(config_of("sft", place, tmp_path / "a", probe_memory=False)).output_dir
    monkeypatch.setattr(probe, "set_rng_state", lambda *_: None)
    b = run(config_of("sft", place, tmp_path / "b", probe_memory=True)).output_dir
    a, b = (load_file(p / "model.safetensors") for p in (a, b))
    assert not all(torch.equal(a[k], b[k]) for k in a)


def test_no_gradient_and_no_plan_of_its_own_stays(place, tmp_path):
    stage = stage_of("dpo", place, tmp_path, probe_memory=True)
    probe.probe(stage, stage.setting)
    assert all(p.grad is None for p in stage.setting.model.parameters())
    assert "plan" not in vars(stage.setting)


# -- the worst -----------------------------------------------------------------------------------------------------
def test_the_longest_rows_as_far_as_the_budget_goes(place, tmp_path):
    stage = stage_of("sft", place, tmp_path, per_device_train_batch_size=30)
    lengths = sorted((len(item[0]) for item in stage.items), reverse=True)
    got = [len(s) for s in worst_case(stage, 50)]
    assert got[: len(got) - 1] == lengths[: len(got) - 1], "the longest"
    assert 50 - lengths[-1] < sum(got) <= 50, "and as much as fits"
    assert len(worst_case(stage, 10_000)) == 30, "no more than a step has"
    assert len(worst_case(stage, 1)) == 1, "at least one, whatever the budget"


def test_completions_of_full_length_to_the_longest_prompts(place, tmp_path):
    for share in (True, False):
        stage = stage_of("grpo", place, tmp_path / str(share), share_prompts=share)
        got = worst_case(stage, 70)
        longest = max(len(p.ids) for p in stage.prompts)
        assert all(s.num_trained == 6 for s in got) and got[0].prompt_length == longest
        assert tokens_of(got, range(len(got)), share) <= 70
    assert len(worst_case(stage, 10_000)) == 8


@pytest.mark.parametrize("stage", STAGES)
def test_no_micro_batch_of_the_run_is_larger(stage, place, tmp_path):
    """Full steps against what was tried: neither tokens nor the longest sequence may surpass it."""
    made = stage_of(stage, place, tmp_path, max_tokens_per_device=40)
    with as_if_alone(made.setting):
        tried = ready(made, made.setting, worst_case(made, 40))
    longest = max(len(s) for s in tried.samples)
    for _ in range(4):
        for micro in made.collect(Quiet()):
            assert max(len(s) for s in micro.samples) <= longest
            assert micro.input_ids.shape[0] <= max(40, tried.input_ids.shape[0])
    assert tried.input_ids.shape[0] > 40 - longest * getattr(made, "unit", 1) or len(tried.samples) == 8


def test_memory_of_the_optimizer_is_counted(place, tmp_path):
    stage = stage_of("sft", place, tmp_path, optim="adamw_torch")
    weights = sum(p.numel() for p in stage.setting.model.parameters())
    assert state_bytes(stage.setting) == 8 * weights
    stage.setting.config.optim = "sgd"
    assert state_bytes(stage.setting) == 0
    stage.setting.config.optim, stage.setting.config.optim_offload = "adamw_torch", True
    assert state_bytes(stage.setting) == 0


def test_gradients_go_at_once_with_the_optimizer_in_the_backward(place, tmp_path):
    stage = stage_of("sft", place, tmp_path)
    stage.setting.config.optimizer_in_backward = True
    rehearse(stage, stage.setting, worst_case(stage, 1000))
    assert all(p.grad is None for p in stage.setting.model.parameters())
    rehearse(stage, stage.setting, worst_case(stage, 30))  # one of several micro-batches: gradients pile up
    assert any(p.grad is not None for p in stage.setting.model.parameters()), "hooks have stayed"


# -- too little memory ---------------------------------------------------------------------------------------------
def small_machine(above: int, patch) -> None:
    def limited(model, objective, micro, how):
        if micro.input_ids.shape[0] > above:
            raise RuntimeError(NO_MEMORY)
        return loss_of(model, objective, micro, how)

    patch(probe, "loss_of", limited)
    patch(loop, "loss_of", limited)


@pytest.mark.parametrize("stage", ["sft", "dpo", "grpo"])
def test_the_budget_is_lowered_before_the_first_step(stage, place, tmp_path, monkeypatch, capfd):
    still = {"model_name_or_path": str(place / "model")}  # without dropout, whose draws follow the cut
    plain = run(config_of(stage, place, tmp_path / "plain", **still)).output_dir
    small_machine(35, monkeypatch.setattr)
    again = run(config_of(stage, place, tmp_path / "small", probe_memory=True, **still)).output_dir
    said = capfd.readouterr()
    told = (said.out + said.err).replace("\n", " ")
    assert "do not fit" in told and "done again" not in told
    a, b = (load_file(p / "model.safetensors") for p in (plain, again))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_one_sequence_too_long_stops_before_the_first_step(place, tmp_path, monkeypatch):
    small_machine(2, monkeypatch.setattr)
    with pytest.raises(OutOfMemoryError, match="before the first step.*--max_length.*fastrl plan sft"):
        run(config_of("sft", place, tmp_path, probe_memory=True))
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()


def test_states_that_do_not_fit_stop_before_the_first_step(place, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "state_bytes", lambda _: 1 << 62)
    with pytest.raises(OutOfMemoryError, match="states of --optim sgd.*fastrl plan sft"):
        run(config_of("sft", place, tmp_path, probe_memory=True))


def test_off_on_the_cpu_unless_asked_for(place, tmp_path):
    stage = stage_of("sft", place, tmp_path)
    assert not probe.wanted(stage.setting)
    stage.setting.device = torch.device("cuda")
    assert probe.wanted(stage.setting)
    stage.setting.config.probe_memory = False
    assert not probe.wanted(stage.setting)


# -- two ranks -----------------------------------------------------------------------------------------------------
WHERE = ("forward", "backward")


def fails_inside(where: str) -> None:
    """While a worst case of more than 35 tokens is tried, the head fails: layers are in the middle of a step then."""
    from fastrl.models.head import LMHead

    own, tight = LMHead.forward, []

    def told(stage, setting, samples):
        tight[:] = [True] * (tokens_of(samples, range(len(samples)), True) > 35)
        rehearse(stage, setting, samples)

    def fail(*_):
        raise RuntimeError(NO_MEMORY)

    def forward(self, hidden, **call):
        if tight and where == "forward":
            fail()
        if tight and hidden.requires_grad:
            hidden.register_hook(fail)
        return own(self, hidden, **call)

    probe.rehearse, LMHead.forward = told, forward


def on_two(place: Path, out: Path) -> None:
    run(config_of("grpo", place, out / "probed", probe_memory=True))
    for where in WHERE:
        fails_inside(where)
        run(config_of("dpo", place, out / where, probe_memory=True))


def test_two_ranks_probe_and_lower_together(place, tmp_path):
    """Both fail in the middle of a sharded step, agree on less, and train what one process trains."""
    run_ranks(2, on_two, place, tmp_path)
    for stage, names in (("grpo", ["probed"]), ("dpo", WHERE)):
        alone = load_file(run(config_of(stage, place, tmp_path / stage)).output_dir / "model.safetensors")
        for name in names:
            together = load_file(tmp_path / name / "model.safetensors")
            assert all(torch.allclose(alone[k], together[k], atol=1e-5) for k in alone), name
