"""Memory that runs out: cut micro-batches give the same losses and gradients, and the run goes on with smaller ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from fastrl.train import DPOConfig, GRPOConfig, RewardConfig, SFTConfig, budget, loop, run
from fastrl.train.budget import OutOfMemoryError, RankOutOfMemoryError, accumulate, cut, in_parts, scored
from fastrl.train.output_dir import Run
from fastrl.train.parallel import World
from fastrl.train.probe import Quiet, attach_numbers, longest_completions
from fastrl.train.step import Forward, loss_of, prepare, score
from fastrl.train.workbench import build

NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. Error code 12 (told by a test)"
REWARDS = "def length(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
CASES = {
    "sft": (SFTConfig, "sft", {}),
    "dpo": (DPOConfig, "dpo", {}),
    "aot": (DPOConfig, "dpo", {"loss_type": ["aot"]}),  # columns of the whole step
    "reward": (RewardConfig, "dpo", {}),
    "grpo": (GRPOConfig, "grpo", {"num_generations": 4, "beta": 0.1, "top_entropy_quantile": 0.5}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("budget")
    tiny.make_model(root / "model")
    tiny.make_data(root)
    (root / "rewards.py").write_text(REWARDS)
    return root


def config_of(name: str, place: Path, out: Path, **options):
    cls, data, more = CASES[name]
    shared = {
        "model_name_or_path": str(place / "model"),
        "dataset_name": str(place / data),
        "output_dir": str(out),
        "per_device_train_batch_size": 16,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optim": "sgd",  # AdamW's first steps follow the sign of the tiniest gradient, and so rounding
        "save_strategy": "no",
    }
    if cls is GRPOConfig:
        shared |= {"reward_funcs": [f"{place}/rewards.py:length"], "max_completion_length": 9}
    return cls(**{**shared, **more, **options})


def step_of(name: str, place: Path, tmp_path: Path, **options):
    """(stage, the micro-batches of a step, what runs one)."""
    config = config_of(name, place, tmp_path, **options)
    stage = build(config, Run(tmp_path, None, [])).stage
    with torch.no_grad():  # away from the reference, where margins are 0 and accuracies a matter of rounding
        for p in stage.setting.model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * p.std()
    if name == "grpo":
        samples = longest_completions(stage, config.max_tokens_per_device)
        attach_numbers(stage, samples, Quiet())
        micros = stage.setting.plan(samples)
    else:
        micros = stage.collect(Quiet())
    micros = prepare(stage.setting.model, stage.objective, micros, stage.how)
    return stage, micros, partial(loss_of, stage.setting.model, stage.objective, how=stage.how)


def unit_of(stage) -> int:
    return getattr(stage, "unit", 1)


def outcome(stage, done) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """(loss, metrics, gradients) of a step; the gradients are dropped."""
    metrics: dict[str, float] = {}
    for _, out in done:
        for key, value in out.metrics.items():
            metrics[key] = metrics.get(key, 0.0) + float(value)
    parameters = list(stage.setting.model.parameters())
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    return float(sum(out.loss for _, out in done)), metrics, grads


def layout_of(micro):
    return micro.cu_seqlens.tolist() if isinstance(micro.cu_seqlens, torch.Tensor) else micro.cu_seqlens


def assert_same(got, want) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-6, abs=1e-7)
    assert got[1] == pytest.approx(want[1], rel=1e-5, abs=1e-6)
    for a, b in zip(got[2], want[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def failing(call, where: str, above: int, times: list[int]):
    """`call`, out of memory with more than `above` tokens: before the forward, or half-way through the backward."""

    def run(micro):
        tokens = micro.input_ids.shape[0]
        if tokens > above and where == "forward":
            times.append(tokens)
            raise RuntimeError(NO_MEMORY)
        out = call(micro)
        if tokens > above:
            out.loss.backward = partial(half_way, out.loss, tokens, times)
        return out

    return run


def half_way(loss, tokens: int, times: list[int]) -> None:
    torch.Tensor.backward(loss)  # what a backward that dies leaves behind: gradients, here all of them
    times.append(tokens)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB (told by a test)")


# -- cutting -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_pieces_add_up_to_the_whole(name, share, place, tmp_path):
    stage, micros, call = step_of(name, place, tmp_path, share_prompts=share)
    unit = unit_of(stage)
    whole = outcome(stage, accumulate(stage.setting, call, micros, unit))
    assert any(g.any() for g in whole[2]), "the case shows nothing"
    pieces = [piece for micro in micros for piece in cut(micro, 30, unit)]
    assert len(pieces) > len(micros)
    assert [s for p in pieces for s in p.samples] == [s for m in micros for s in m.samples]
    assert [i for p in pieces for i in p.indices] == [i for m in micros for i in m.indices]
    for piece in pieces:
        assert len(piece.samples) % unit == 0
        assert piece.input_ids.shape[0] <= 30 or len(piece.samples) == unit
    assert_same(outcome(stage, accumulate(stage.setting, call, pieces, unit)), whole)


@pytest.mark.parametrize("name", ["sft", "grpo"])
def test_a_piece_is_what_planning_its_samples_gives(name, place, tmp_path):
    stage, micros, _ = step_of(name, place, tmp_path)
    for piece in cut(micros[0], 30):
        [planned] = stage.setting.plan(piece.samples)
        assert torch.equal(piece.input_ids, planned.input_ids) and torch.equal(piece.rows, planned.rows)
        assert layout_of(piece) == layout_of(planned)
        assert torch.equal(piece.batch.targets, planned.batch.targets)
        assert torch.equal(piece.batch.cu_seqlens, planned.batch.cu_seqlens)


# -- the step ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_that_runs_out_of_memory_is_done_again_exactly(name, where, place, tmp_path):
    stage, micros, call = step_of(name, place, tmp_path)
    setting, unit, times = stage.setting, unit_of(stage), []
    whole = outcome(stage, accumulate(setting, call, micros, unit))
    largest = max(m.input_ids.shape[0] for m in micros)
    above = largest // 3
    done = accumulate(setting, failing(call, where, above, times), micros, unit)
    assert times and len(done) > len(micros)
    assert_same(outcome(stage, done), whole)
    assert setting.budget < largest and setting.budget <= times[-1] // 2
    assert len(setting.notes) == len(times) and all("done again" in note for note in setting.notes)


def test_micro_batches_before_the_one_that_failed_in_its_backward_count_once(place, tmp_path):
    """Several micro-batches, the last of them fails half-way: those before it have left gradients too."""
    stage, micros, call = step_of("sft", place, tmp_path)
    pieces = sorted(cut(micros[0], 25), key=lambda m: m.input_ids.shape[0])
    whole = outcome(stage, accumulate(stage.setting, call, pieces))
    times: list[int] = []
    above = pieces[-1].input_ids.shape[0] - 1
    done = accumulate(stage.setting, failing(call, "backward", above, times), pieces)
    assert len(times) == 1
    assert_same(outcome(stage, done), whole)


def test_gradients_that_stayed_would_show(place, tmp_path, monkeypatch):
    """A planted mistake: the gradients of the failed backward are kept."""
    stage, micros, call = step_of("sft", place, tmp_path)
    whole = outcome(stage, accumulate(stage.setting, call, micros))
    monkeypatch.setattr(budget, "drop_gradients", lambda *_: None)
    done = accumulate(stage.setting, failing(call, "backward", 60, []), micros)
    with pytest.raises(AssertionError):
        assert_same(outcome(stage, done), whole)


def test_a_single_sequence_that_does_not_fit_names_the_flags(place, tmp_path):
    stage, micros, call = step_of("sft", place, tmp_path)
    with pytest.raises(OutOfMemoryError, match="--max_tokens_per_device.*--max_length.*fastrl plan sft"):
        accumulate(stage.setting, failing(call, "forward", 3, []), micros)
    stage, micros, call = step_of("dpo", place, tmp_path)
    with pytest.raises(OutOfMemoryError, match="2 sequences that belong together"):
        accumulate(stage.setting, failing(call, "forward", 3, []), micros, 2)


def test_on_several_ranks_it_says_which_and_how_to_go_on(place, tmp_path):
    stage, micros, call = step_of("sft", place, tmp_path)
    stage.setting.world = World(rank=1, size=2)
    with pytest.raises(RankOutOfMemoryError, match="rank 1 of 2.*--max_tokens_per_device.*--resume_from_checkpoint"):
        accumulate(stage.setting, failing(call, "forward", 60, []), micros)


def test_a_backward_that_has_updated_weights_is_not_done_again(place, tmp_path):
    stage, micros, call = step_of("sft", place, tmp_path)
    with pytest.raises(OutOfMemoryError, match="begun to update"):
        accumulate(stage.setting, failing(call, "backward", 60, []), micros, moved=lambda: True)


def test_other_errors_pass(place, tmp_path):
    stage, micros, _ = step_of("sft", place, tmp_path)

    def broken(micro):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        accumulate(stage.setting, broken, micros)
    assert not stage.setting.notes


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(NO_MEMORY),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
    ],
)
def test_what_running_out_of_memory_looks_like(error):
    assert budget.out_of_memory(error)
    assert not budget.out_of_memory(ValueError(str(error)))


# -- scoring -------------------------------------------------------------------------------------------------------
def test_scores_in_pieces_are_in_order(place, tmp_path, monkeypatch):
    stage, micros, _ = step_of("sft", place, tmp_path)
    setting, how = stage.setting, Forward()
    want = score(setting.model, micros[0], how)

    def little(model, micro, how):
        if micro.input_ids.shape[0] > 20:
            raise MemoryError
        return score(model, micro, how)

    monkeypatch.setattr(budget, "score", little)
    got = scored(setting, setting.model, micros[0], how)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-6, atol=1e-6)
    assert setting.notes and setting.budget < 60


def test_in_parts_cuts_again_what_still_does_not_fit(place, tmp_path):
    stage, micros, _ = step_of("sft", place, tmp_path)
    seen = []

    def sizes(micro):
        seen.append(micro.input_ids.shape[0])
        if seen[-1] > 15:
            raise MemoryError
        return micro.samples

    made = in_parts(stage.setting, sizes, micros[0])
    assert [s for part in made for s in part] == micros[0].samples and len(made) > 4


def test_what_was_planned_before_the_budget_was_lowered_does_not_fail_again(place, tmp_path):
    stage, micros, call = step_of("sft", place, tmp_path, max_tokens_per_device=60)
    assert len(micros) > 1
    failures: list[int] = []
    accumulate(stage.setting, failing(call, "forward", 35, failures), micros)
    assert len(failures) == 1
    failures.clear()
    for micro in micros:  # planned for 60
        in_parts(stage.setting, failing(call, "forward", 35, failures), micro)
    assert not failures


# -- runs ----------------------------------------------------------------------------------------------------------
def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


def small_machine(monkeypatch, above: int) -> None:
    """loss_of runs out of memory with more than `above` tokens, wherever it is called."""
    from fastrl.train.stages import base

    def limited(model, objective, micro, how):
        if micro.input_ids.shape[0] > above:
            raise RuntimeError(NO_MEMORY)
        return loss_of(model, objective, micro, how)

    monkeypatch.setattr(loop, "loss_of", limited)
    monkeypatch.setattr(base, "loss_of", limited)


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_a_run_goes_on_with_smaller_micro_batches(name, place, tmp_path, monkeypatch, capfd):
    options = {"eval_strategy": "steps", "eval_steps": 3, "max_grad_norm": 0.0}
    plain = run(config_of(name, place, tmp_path / "plain", **options)).output_dir
    small_machine(monkeypatch, 60)
    again = run(config_of(name, place, tmp_path / "small", **options)).output_dir
    said = capfd.readouterr()
    told = (said.out + said.err).replace("\n", " ")
    assert 1 <= told.count("out of memory") <= 3, told
    keys = ["loss", "grad_norm"] + (["eval_loss"] if name != "grpo" else ["eval_reward"])
    for key in keys:
        a, b = records(plain, key), records(again, key)
        assert a and a == pytest.approx(b, rel=1e-4, abs=1e-6), key
    a, b = (load_file(p / "model.safetensors") for p in (plain, again))
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def test_a_resumed_run_starts_with_the_lowered_budget(place, tmp_path, monkeypatch):
    small_machine(monkeypatch, 60)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    out = run(config_of("sft", place, tmp_path, **options)).output_dir
    state = json.loads(next((out / "checkpoint-2").rglob("trainer_state.json")).read_text())
    assert "budget" in json.dumps(state)
    budgets = []
    monkeypatch.setattr(loop, "accumulate", spy(budgets))
    again = {**options, "resume_from_checkpoint": str(out / "checkpoint-2")}
    run(config_of("sft", place, tmp_path / "again", **again))
    assert budgets and max(budgets) <= 60
    budgets.clear()  # a budget that was asked for anew counts
    run(config_of("sft", place, tmp_path / "anew", **again, max_tokens_per_device=4000))
    assert budgets[0] == 4000


def spy(budgets: list[int]):
    def accumulate_(setting, *args, **more):
        budgets.append(setting.budget)
        return accumulate(setting, *args, **more)

    return accumulate_


def test_what_is_longer_than_the_budget_is_noted_once(place, tmp_path, capfd):
    run(config_of("sft", place, tmp_path, max_tokens_per_device=4))
    said = capfd.readouterr()
    assert (said.out + said.err).replace("\n", " ").count("micro-batch of its own") == 1


# -- a machine that really is too small ----------------------------------------------------------------------------
REAL = """
import json, resource, sys
from functools import partial
from pathlib import Path
import torch
torch.set_num_threads(1)
from fastrl.train import SFTConfig
from fastrl.train.budget import accumulate
from fastrl.train.output_dir import Run
from fastrl.train.probe import Quiet
from fastrl.train.step import loss_of
from fastrl.train.workbench import build

def status(name):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(name))

place = Path(sys.argv[1])
names = {"model_name_or_path": "model", "dataset_name": "long", "output_dir": "o"}
paths = {name: str(place / where) for name, where in names.items()}
config = SFTConfig(**paths, per_device_train_batch_size=8, gradient_checkpointing=False, max_length=None)
stage = build(config, Run(place / "o", None, [])).stage
setting = stage.setting
micros = stage.collect(Quiet())
call = partial(loss_of, setting.model, stage.objective, how=stage.how)

def step(limit):
    size, before = status("VmSize"), status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    if limit:
        resource.setrlimit(resource.RLIMIT_AS, (size + limit, resource.RLIM_INFINITY))
    done = accumulate(setting, call, micros)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    grads = {n: p.grad.clone() for n, p in setting.model.named_parameters()}
    for p in setting.model.parameters():
        p.grad = None
    return float(sum(o.loss for _, o in done)), grads, status("VmHWM") - before, len(done)

step(0)  # whatever is allocated once
loss, grads, need, count = step(0)
out = {"micro_batches": count, "tokens": micros[0].input_ids.shape[0], "need_mib": need >> 20, "tries": []}
for share in (0.8, 0.5):
    setting.budget, setting.notes[:] = 8192, []
    again, others, _, parts = step(int(need * share))
    worst = max(float((others[n] - grads[n]).abs().max() / grads[n].abs().max()) for n in grads)
    out["tries"].append({"parts": parts, "loss": abs(again - loss), "worst": worst, "budget": setting.budget,
                         "notes": setting.notes[:]})
print(json.dumps(out))
"""


def test_a_real_limit_on_memory(place, tmp_path):
    """A process that may not have the memory of the whole micro-batch, for the allocator itself to refuse."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "max_position_embeddings": 512}
    tiny.make_model(place / "big", **shape)
    (place / "real").mkdir()
    (place / "big").rename(place / "real" / "model")
    rows = [{"text": "0123456789+= ?abc"[i % 5 :] * 16} for i in range(8)]
    tiny.write(place / "real" / "long" / "train.jsonl", rows, ("text",))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", REAL, str(place / "real")], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["micro_batches"] == 1
    for made in told["tries"]:
        assert made["parts"] > 1 and made["notes"] and made["budget"] < told["tokens"], told
        assert made["loss"] < 1e-6 and made["worst"] < 1e-5, told
