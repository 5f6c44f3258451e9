"""`fastrl plan`: what is counted, what is extrapolated from it, and what a run really takes."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from fastrl import losses
from fastrl.cli import main
from fastrl.ops import fused_loss
from fastrl.tokens import TokenBatch
from fastrl.train.config import CONFIGS
from fastrl.train.flags import ConfigError
from fastrl.train.optim import build_optimizer
from fastrl.train.plan import Device, MemoryModel, device_of, fit, switches, tried
from fastrl.train.plan.curves import fitted
from fastrl.train.plan.head import HeadShape, workspace
from fastrl.train.plan.liveness import Liveness, births
from fastrl.train.plan.measure import REAL_WORDS, Tracer, curve_of, kv_bytes
from fastrl.train.plan.skeleton import CAUSAL, Part, architecture, build, dressed, parts_of, quiet, shrunken, sizes
from fastrl.train.plan.trace import HEAD, How

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))  # its scripts import each other as they stand there

import plan_check  # noqa: E402

SHAPE = dict(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    """A config.json alone: nothing here may need weights or a tokenizer."""
    from transformers import Qwen3Config

    path = tmp_path_factory.mktemp("model")
    Qwen3Config(**SHAPE, architectures=["Qwen3ForCausalLM"]).save_pretrained(path)
    return path


def config_of(model_dir, stage="sft", **flags):
    needed = {"reward_funcs": ["think_format"]} if stage in ("grpo", "rloo") else {}
    return CONFIGS[stage](
        model_name_or_path=str(model_dir), dataset_name="none", output_dir="none", use_cpu=True, **needed, **flags
    )


def cpu(gib: float = 16.0) -> Device:
    return Device("cpu", "cpu", int(gib * 2**30))


# -- counting ----------------------------------------------------------------------------------------------------------
def test_storages_are_counted_from_birth_to_death():
    weights = torch.ones(8, 8)
    counted = Liveness()
    counted.ignore([weights])
    with counted:
        a = weights @ weights  # 256 bytes
        b = a.t().reshape(64).view(8, 8)  # its transpose is copied once, the view is not
        counted.segment = "later"
        del a
        c = b + 1
        weights.add_(1)
        del b, c
    assert births(counted.log, set()) == {"start": [(0, 256), (0, 512)], "later": [(0, 512)]}
    assert sum(size for *_, size in counted.log) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tensors_without_data_are_counted_like_those_with(model_dir, checkpointing):
    config = config_of(model_dir, gradient_checkpointing=checkpointing)
    part = parts_of(config)[0]
    small = shrunken(architecture(part), 3, words=REAL_WORDS)  # as many as the run with data has
    made = [Tracer([part], [small], config, How(share=0.5), real).run(3, [96])[3, 96] for real in (False, True)]
    assert made[0].keys() == made[1].keys()
    for segment in made[0]:
        assert made[0][segment] == made[1][segment], segment


# -- extrapolating -----------------------------------------------------------------------------------------------------
WHOLE = {"gradient_checkpointing": False}
WAYS = {
    "ragged": (WHOLE, How(lengths=(0.625, 0.375), share=0.5)),
    "family": (WHOLE, How(lengths=(0.4, 0.3, 0.3), parents=(-1, 0, 0), share=0.6, accumulate=True)),
    "selective": ({"gradient_checkpointing_policy": "selective"}, How(autocast=torch.bfloat16)),
    "tiled": ({"tiled_mlp": 4}, How(in_backward=True)),
    "scoring": ({}, How(backward=False)),
    "lora": ({**WHOLE, "use_peft": True}, How()),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_curve_is_what_a_deeper_and_longer_trace_says(model_dir, way):
    flags, how = WAYS[way]
    config = config_of(model_dir, **flags)
    part = parts_of(config)[0]
    arch = architecture(part)
    curve = curve_of([part], [arch], config, how)
    assert curve.exact and not curve.notes, curve.notes
    tokens = 4000
    layers = SHAPE["num_hidden_layers"]
    whole = Tracer([part], [arch], config, how, real=False).run(layers, [tokens])[layers, tokens]
    for work in (0, 10 << 20):  # of the head: moves the moment of the peak
        want = max(sum(x) + work * (name == HEAD) for name, made in whole.items() for x in made)
        moment = curve.peak(tokens, None, work)
        got = moment.gradients + moment.others + work * moment.head
        assert got == pytest.approx(want, rel=2e-3), way


def test_a_wrong_extrapolation_is_seen(model_dir):
    """The last block's forward under the first one's name: the curve then has no slope in the layers there."""
    config = config_of(model_dir, gradient_checkpointing=False)
    part = parts_of(config)[0]
    arch = architecture(part)
    tracer, traces = Tracer([part], [arch], config, How(), real=False), {}
    for layers in (2, 3):
        for key, made in tracer.run(layers, (768, 1536)).items():
            traces[key] = {n: x for n, x in made.items() if n.startswith("0F")}
    right, wrong = fitted(traces, 6), fitted({k: t for k, t in traces.items() if k[0] == 2}, 6)
    assert right.peak(4000, None, 0).others > 1.5 * wrong.peak(4000, None, 0).others


def test_attention_that_is_no_kernel_has_a_square(model_dir):
    config = config_of(model_dir, attn_implementation="eager", gradient_checkpointing=False)
    part = parts_of(config)[0]
    eager = curve_of([part], [architecture(part)], config, How())
    flash = curve_of([part], [architecture(part)], config_of(model_dir, gradient_checkpointing=False), How())
    assert eager.quadratic and not flash.quadratic
    assert eager.peak(4096, 4096, 0).others > 2 * eager.peak(4096, 512, 0).others
    assert flash.peak(4096, 4096, 0).others == pytest.approx(flash.peak(4096, 512, 0).others)


def test_experts_read_their_tokens_and_are_measured(tmp_path):
    """Routing asks for values, so small random weights run, and the plan says so."""
    from transformers import Qwen3MoeConfig

    moe = Qwen3MoeConfig(
        **{**SHAPE, "num_hidden_layers": 2}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    moe.save_pretrained(tmp_path)
    model = MemoryModel(config_of(tmp_path), cpu())
    assert model.estimate().peak.rows["activations"] > 0


# -- sizes -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_those_of_the_model(tmp_path, tied):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    arch = Qwen3Config(**{**SHAPE, "tie_word_embeddings": tied})
    arch.save_pretrained(tmp_path)
    real = Qwen3ForCausalLM(arch)
    config = config_of(tmp_path)
    made = sizes(parts_of(config)[0], architecture(parts_of(config)[0]), config)
    assert made.parameters == made.trained == sum(p.numel() for p in real.parameters())
    buffers = sum(b.nbytes for b in real.buffers())
    assert made.weights == sum(p.nbytes for p in real.parameters()) + buffers
    assert made.largest == SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4


OPTIMS = {
    "adamw_torch": {}, "adamw_torch_fused": {}, "sgd": {}, "muon": {}, "adafactor": {},
    "kahan": {"optim": "adamw_torch", "dtype": "bfloat16", "bf16_update": "kahan"},
    "stochastic": {"optim": "adamw_torch", "dtype": "bfloat16", "bf16_update": "stochastic"},
    "adamw_torch_8bit": {}, "adamw_torch_4bit": {},
}  # fmt: skip


@pytest.mark.parametrize("optim", OPTIMS)
def test_optimizer_states_are_those_of_the_optimizer(model_dir, optim):
    from fastrl.train.plan.optimizer import state_bytes

    config = config_of(model_dir, **({"optim": optim} | OPTIMS[optim]))
    part = parts_of(config)[0]
    with quiet():
        model = dressed(build(part, architecture(part), config), part, config)
    optimizer = build_optimizer(model, config)
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e-3)
    optimizer.step()
    real = sum(
        x.nbytes for s in optimizer.state.values() for x in s.values() if isinstance(x, torch.Tensor) and x.dim()
    )
    planned = state_bytes(config, sizes(part, architecture(part), config).shapes)
    assert planned == pytest.approx(real, rel=0.01, abs=16)


@pytest.mark.parametrize(("rows", "words"), [(700, 5000), (64, 20000), (3000, 700)])
def test_the_head_takes_what_its_plan_says(rows, words):
    torch.manual_seed(0)
    hidden = torch.randn(rows, 64, requires_grad=True)
    weight = torch.randn(words, 64, requires_grad=True)
    batch = TokenBatch(targets=torch.randint(words, (rows,)), advantages=torch.randn(rows), num_tokens=rows)
    counted = Liveness()
    counted.ignore([hidden, weight])
    with counted:
        fused_loss(losses.get("grpo"), hidden, weight, batch, outputs=("entropy",))
    peak = max(other for made in births(counted.log, set()).values() for _, other in made)
    planned = workspace(HeadShape(rows, 64, words, torch.float32, "cpu", True)) + 4 * 64 * (rows + words)
    assert planned == pytest.approx(peak, rel=0.10)


def test_cache_of_generation(model_dir):
    part = Part("policy", str(model_dir), CAUSAL)
    fixed, each = kv_bytes(part, architecture(part), config_of(model_dir), None)
    assert fixed == 0 and each == 2 * SHAPE["num_hidden_layers"] * 2 * 16 * 4  # keys and values, 2 heads of 16 floats


# -- the plan ----------------------------------------------------------------------------------------------------------
def test_every_stage_has_a_plan(model_dir):
    flags = {
        "ppo": {"reward_funcs": ["think_format"], "max_prompt_length": 64},
        "grpo": {"max_prompt_length": 64, "beta": 0.1},
        "rloo": {"max_prompt_length": 64},
        "distill": {"teacher_model_name_or_path": str(model_dir)},
    }
    cache: dict = {}
    for stage in ("sft", "dpo", "grpo", "reward", "ppo", "distill"):
        assert stage in CONFIGS
        model = MemoryModel(config_of(model_dir, stage, **flags.get(stage, {})), cpu(), cache=cache)
        rows = {name for phase in model.estimate().phases for name in phase.rows}
        assert {"weights", "gradients", "optimizer", "activations"} <= rows, stage
        wanted = {"dpo": "reference", "kto": "reference", "grpo": "KV cache", "ppo": "critic", "distill": "teacher"}
        assert wanted.get(stage, "weights") in rows, stage


def test_what_fits_fits_and_more_does_not(model_dir):
    model = MemoryModel(config_of(model_dir), cpu(1.0))
    most = model.most_tokens()
    assert model.fits(most) and not model.fits(int(most * 1.03))
    assert model.most_tokens(as_one=True) == pytest.approx(most, rel=0.05)


def test_more_devices_take_less_each(model_dir):
    one, four = (MemoryModel(config_of(model_dir), cpu(), ranks=n).estimate().peak.rows for n in (1, 4))
    assert four["optimizer"] == one["optimizer"] // 4 and four["weights"] < one["weights"]
    assert four["activations"] == one["activations"]


def test_switches_and_fit(model_dir, monkeypatch):
    """A device that the run just misses: the plan finds flags, and with these it fits."""
    few = [s for s in switches.SWITCHES if set(s.flags) & {"optim", "gradient_checkpointing"}]
    monkeypatch.setattr(switches, "SWITCHES", tuple(few[:3]))
    config = config_of(model_dir, "dpo", gradient_checkpointing=False, per_device_train_batch_size=64)
    whole = MemoryModel(config, cpu())
    trials = tried(whole)
    assert [t.saves for t in trials] == sorted((t.saves for t in trials), reverse=True)
    flags = [t.flags for t in trials]
    assert any("gradient_checkpointing" in f for f in flags)
    tight = dataclasses.replace(whole, device=cpu(0.97 * whole.estimate().total / 2**30))
    found = fit(tight)
    assert found.flags, found
    again = MemoryModel(dataclasses.replace(config, **found.flags), tight.device)
    assert again.fits() and not tight.fits()
    hopeless = dataclasses.replace(whole, device=cpu(0.1))
    assert fit(hopeless).flags is None


def test_the_command(model_dir, capsys):
    argv = ["plan", "grpo", "--model_name_or_path", str(model_dir), "--max_prompt_length", "64"]
    assert main([*argv, "--device", "24GiB", "--brief"]) == 0
    text = capsys.readouterr().out
    for word in ("update", "sampling", "KV cache", "most tokens that fit", "24GiB"):
        assert word in text, text
    assert all(len(line) <= 140 for line in text.splitlines())
    assert main([*argv, "--device", "0.8GiB", "--json", "--brief"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert not record["fits"] and record["total_bytes"] == max(sum(p.values()) for p in record["phases"].values())


def test_the_command_refuses(model_dir, capsys):
    for argv, said in (
        (["plan", "sfx"], "did you mean sft"),
        (["plan", "sft", "--model_name_or_path", str(model_dir), "--device", "h1000"], "--device must be one of"),
        (["plan", "sft", "--model_name_or_path", str(model_dir), "--devices", "x"], "--devices must be"),
        (["plan", "sft", "--model_name_or_path", str(model_dir), "--learning_rat", "1"], "learning_rate"),
        (["plan", "sft"], "--model_name_or_path is required"),
    ):
        assert main(argv) == 2 and said in capsys.readouterr().err, argv
    with pytest.raises(ConfigError):
        device_of("tpu")


# -- against a run -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def measured() -> dict:
    names = [case.name for case in (*plan_check.CASES, *plan_check.MORE)]
    rows = plan_check.measured(names, threads=1)
    return {"rows": {row["case"]: row for row in rows}, **plan_check.slopes(rows)}


@pytest.mark.parametrize("case", [case.name for case in plan_check.CASES])
def test_within_a_tenth_of_the_measured_peak(measured, case):
    row = measured["rows"][case]
    assert row["measured_mib"] > 100
    assert abs(row["error"]) <= plan_check.LIMIT, row


def test_the_slope_in_tokens_is_the_planned_one(measured):
    slope = measured["kib_a_token"]
    assert slope["planned"] == pytest.approx(slope["measured"], rel=0.10)


def test_words_cost_their_weights_and_states_alone(measured):
    few, many = measured["beyond_static_mib"].values()
    assert abs(many - few) < 0.08 * measured["rows"]["sft"]["measured_mib"]
