"""Flags, YAML and the checks between fields; the command line around them."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from fastrl import cli
from fastrl.cli import FOREIGN
from fastrl.train import ConfigError, DPOConfig, GRPOConfig, SFTConfig, run
from fastrl.train.config import CONFIGS
from fastrl.train.flags import field_types, help_text, load_yaml, parse

ROOT = Path(__file__).resolve().parents[1]
BASE = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
ARGV = [w for k, v in BASE.items() for w in (f"--{k}", v)]


def sft(**changes):
    return SFTConfig(**{**BASE, **changes})


def grpo(**changes):
    return GRPOConfig(**{**BASE, "reward_funcs": ["exact"], **changes})


def refused(fragments, make, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        make(*args, **kwargs)
    for fragment in fragments:
        assert fragment in str(caught.value), f"{fragment!r} not in {caught.value}"


# -- flags -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cls", CONFIGS.values())
def test_every_field_has_help_and_parses_its_own_default(cls):
    extra = ["--reward_funcs", "exact"] if "reward_funcs" in cls.__dataclass_fields__ else []
    default = parse(cls, ARGV + extra)
    for f in dataclasses.fields(cls):
        assert f.metadata["help"].strip(), f.name
        value = getattr(default, f.name)
        words = ["none"] if value is None else list(map(str, value)) if isinstance(value, list) else [str(value)]
        if f.name in (*BASE, "reward_funcs"):
            continue
        again = parse(cls, [*ARGV, *extra, f"--{f.name}", *words])
        assert getattr(again, f.name) == value, f.name
    assert help_text(cls).count("\n      ") == len(dataclasses.fields(cls))
    assert help_text(cls).startswith("  --model_name_or_path")
    assert help_text(cls).index("\noptimizer:") < help_text(cls).index("--learning_rate")


def test_defaults_agree_with_trl():
    trl = {
        SFTConfig: {"learning_rate": 2e-5, "max_length": 1024, "loss_type": "nll", "completion_only_loss": None},
        DPOConfig: {"learning_rate": 1e-6, "beta": None, "label_smoothing": None, "max_length": 1024},
        GRPOConfig: {"learning_rate": 1e-6, "num_generations": 8, "max_completion_length": 512, "beta": 0.0,
                     "clip_low": 0.2, "clip_high": 0.2, "temperature": 1.0, "num_iterations": 1, "loss_type": "dapo",
                     "scale_rewards": "group", "estimator": "is_k3"},
    }  # fmt: skip
    shared = {"per_device_train_batch_size": 8, "num_train_epochs": 3.0, "adam_beta2": 0.999, "max_grad_norm": 1.0,
              "weight_decay": 0.0, "seed": 42, "logging_steps": 10.0, "save_steps": 500.0, "warmup_ratio": 0.0,
              "lr_scheduler_type": "linear", "dtype": "float32", "gradient_checkpointing": True}  # fmt: skip
    for cls, own in trl.items():
        config = cls(**BASE, **({"reward_funcs": ["exact"]} if cls is GRPOConfig else {}))
        for name, value in {**shared, **own}.items():
            assert getattr(config, name) == value, (cls, name)


def test_command_line_forms():
    argv = "--learning-rate=1e-6 --max_steps -1 --assistant_only_loss --bf16 no --report_to tensorboard wandb"
    config = parse(SFTConfig, [*ARGV, *argv.split(), "--eval_strategy", "no", "--max_length", "none"])
    assert (config.learning_rate, config.max_steps, config.assistant_only_loss, config.bf16) == (1e-6, -1, True, False)
    assert (config.report_to, config.eval_strategy, config.max_length) == (["tensorboard", "wandb"], "no", None)
    config = parse(GRPOConfig, [*ARGV, "--reward_funcs", "a.b", "f.py:g", "--reward_weights", "1", "0.5"])
    assert (config.reward_funcs, config.reward_weights) == (["a.b", "f.py:g"], [1.0, 0.5])
    assert grpo(scale_rewards=False).scale_rewards == "none" and grpo(scale_rewards=True).scale_rewards == "group"
    for word, want in {"auto": "auto", "true": "auto", "false": None, "o/checkpoint-3": "o/checkpoint-3"}.items():
        assert parse(SFTConfig, [*ARGV, "--resume_from_checkpoint", word]).resume_from_checkpoint == want
    assert parse(SFTConfig, [*ARGV, "--resume_from_checkpoint"]).resume_from_checkpoint == "auto"


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        ("--lerning_rate 1", ["--lerning_rate", "`fastrl sft`", "did you mean learning_rate?"]),
        ("--packing true", ["--packing", "always packed", "drop it"]),
        ("--trust_remote_code true", ["never runs code"]),
        ("--learning_rate fast", ["--learning_rate must be float", "got str 'fast'"]),
        ("--max_steps 1.5", ["--max_steps must be int", "'1.5'"]),
        ("--bf16 maybe", ["--bf16 must be bool or none", "'maybe'"]),
        ("--learning_rate nan", ["finite", "nan"]),
        ("--learning_rate -1", ["--learning_rate must be at least 0", "-1"]),
        ("--eval_strategy step", ["one of no, steps, epoch", "did you mean steps?"]),
        ("--seed 1 2", ["one value", "'1 2'"]),
        ("--seed", ["one value", "got 0"]),
        ("--seed 1 --seed 2", ["--seed is given twice"]),
        ("stray", ["--output_dir takes one value", "stray"]),
        ("--config a b", ["--config takes one file"]),
        ("--config /nonexistent.yaml", ["no such file"]),
    ],
)
def test_bad_flags_are_named(argv, fragments):
    refused(fragments, parse, SFTConfig, [*ARGV, *argv.split()], FOREIGN)


@pytest.mark.parametrize("name", [f.name for cls in CONFIGS.values() for f in dataclasses.fields(cls)])
def test_wrong_type_is_named_for_every_field(name):
    cls = next(c for c in CONFIGS.values() if name in c.__dataclass_fields__)
    values = {**BASE, **({"reward_funcs": ["exact"]} if "reward_funcs" in cls.__dataclass_fields__ else {})}
    wrong = object() if name != "reward_funcs" else [3]
    refused([f"--{name} must be"], cls, **{**values, name: wrong})
    if bool not in field_types(cls)[name]:
        refused([f"--{name}"], cls, **{**values, name: True})


def test_every_flag_is_read_somewhere():
    """A flag that nothing reads would be dropped silently; the one without effect says so in its help."""
    configs = ROOT / "fastrl/train/configs"
    read = "".join(p.read_text() for p in (ROOT / "fastrl").rglob("*.py") if p.parent != configs)
    own = "".join(p.read_text() for p in configs.glob("*.py"))
    for name in {f.name for cls in CONFIGS.values() for f in dataclasses.fields(cls)}:
        used = re.search(rf"config\.{name}\b|\"{name}\"", read) or re.search(rf"self\.{name}\b", own)
        through = name.endswith("_steps") and 'f"{what}_steps"' in own
        assert used or through or name == "per_device_eval_batch_size", name


# -- checks between fields -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "changes", "fragments"),
    [
        (sft, {"model_name_or_path": ""}, ["--model_name_or_path is required"]),
        (grpo, {"reward_weights": ["x"]}, ["--reward_weights must be list[float]"]),
        (sft, {"warmup_ratio": 0.1, "warmup_steps": 5.0}, ["--warmup_ratio 0.1", "--warmup_steps 5", "one of them"]),
        (sft, {"lr_scheduler_type": "constant", "warmup_steps": 5.0}, ["constant_with_warmup"]),
        (sft, {"max_steps": 0}, ["--max_steps is 0"]),
        (sft, {"report_to": ["none", "wandb"]}, ["none excludes the others"]),
        (sft, {"eval_steps": 5.0}, ["--eval_steps 5", "--eval_strategy no"]),
        (sft, {"resume_from_checkpoint": "auto", "overwrite_output_dir": True}, ["contradict"]),
        (sft, {"report_to": ["wandbb"]}, ["did you mean wandb?"]),
        (grpo, {"reward_funcs": []}, ["--reward_funcs is required"]),
        (grpo, {"reward_weights": [1.0, 2.0]}, ["2 numbers for 1 reward_funcs"]),
        (grpo, {"num_generations": 6}, ["8 x 1", "--num_generations 6", "such as 6"]),
        (grpo, {"steps_per_generation": 3, "gradient_accumulation_steps": 2}, ["3 must be a multiple", "steps 2"]),
        (grpo, {"delta": 1.1}, ["--delta 1.1 must be above", "1.2"]),
        (grpo, {"top_p": 0.9}, ["--top_p 0.9", "--top_p 1"]),
        (grpo, {"top_k": 50}, ["--top_k 50"]),
        (grpo, {"temperature": 0.0}, ["--temperature must be above 0"]),
        (grpo, {"loss_type": "gsop"}, ["--loss_type must be one of", "'gsop'"]),
    ],
)
def test_contradictions_are_refused(make, changes, fragments):
    refused(fragments, make, **changes)


def test_derived_numbers():
    sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    config = grpo(**sizes, steps_per_generation=8, num_iterations=2)
    assert (config.batch_size, config.prompts_per_step, config.completions_per_generation) == (64, 8, 128)
    assert (config.updates_per_generation, config.clip_low, config.clip_high) == (4, 0.2, 0.2)
    assert grpo().updates_per_generation == 1 and grpo(epsilon_high=0.28).clip_high == 0.28
    assert sft(num_train_epochs=2.0).total_steps(7.5) == 15 and sft(max_steps=4).total_steps(100) == 4


def test_when_things_are_due():
    config = sft(logging_steps=3.0, eval_strategy="epoch", save_strategy="steps", save_steps=0.25)

    def due(what):
        return [step for step in range(11) if config.is_due(what, step, 10, steps_per_epoch=4)]

    assert due("logging") == [1, 3, 6, 9, 10]
    assert due("eval") == [4, 8, 10]  # the last step always
    assert due("save") == [3, 6, 9, 10]  # a quarter of 10 steps, rounded up
    assert config.every("eval_steps", 10) == 3  # none: as logging
    assert not any(sft(save_strategy="no").is_due("save", s, 10, math.inf) for s in range(11))


# -- YAML ----------------------------------------------------------------------------------------------------------
def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return str(path)


def test_yaml_and_precedence(tmp_path):
    text = "learning_rate: 1e-6\nmax_steps: 7\neval_strategy: no\nreport_to: tensorboard\n"
    text += "resume_from_checkpoint: true\n"
    config = parse(SFTConfig, [*ARGV, "--config", write(tmp_path, text), "--max_steps", "9"])
    assert (config.learning_rate, config.max_steps, config.eval_strategy) == (1e-6, 9, "no")  # YAML: 1e-6 is a string
    assert (config.report_to, config.resume_from_checkpoint) == (["tensorboard"], "auto")
    config = parse(GRPOConfig, [*ARGV, "--config", write(tmp_path, "reward_funcs: exact\nscale_rewards: false\n")])
    assert (config.reward_funcs, config.scale_rewards) == (["exact"], "none")


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("lerning_rate: 1\n", ["c.yaml: key lerning_rate", "did you mean learning_rate?"]),
        ("seed: 1\nmax_steps: 2\nseed: 3\n", ["c.yaml:3", "'seed'", "line 1"]),
        ("max-steps: 1\nmax_steps: 2\n", ["max_steps is given twice"]),
        ("a: &x 1\nseed: *x\n", ["c.yaml:2", "aliases"]),
        ("- 1\n", ["key: value", "list"]),
        ("seed: [1\n", ["not valid YAML"]),
        ("seed: !!python/object/apply:os.getcwd []\n", ["not valid YAML", "python/object"]),
        ("seed: {a: 1}\n", ["--seed must be int", "dict"]),
        ("seed: yes\n", ["--seed must be int, got bool True"]),
        ("use_vllm: true\n", ["key use_vllm", "transformers' generation"]),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, fragments):
    refused(fragments, parse, SFTConfig, [*ARGV, "--config", write(tmp_path, text)], FOREIGN)


def test_an_alias_bomb_and_a_huge_file_end_at_once(tmp_path):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    refused(["aliases"], load_yaml, write(tmp_path, bomb))
    refused(["bytes"], load_yaml, write(tmp_path, "a: " + "x" * (1 << 20)))


def test_resolved_config_reads_back_and_holds_no_secret(tmp_path, monkeypatch):
    from fastrl.train.output_dir import dump_config

    monkeypatch.setenv("HF_TOKEN", "hf_canary_123456")
    config = sft(
        output_dir=str(tmp_path), run_name="run hf_canary_123456", dataset_name="https://me:pa55w0rd@host/d.jsonl"
    )
    text = dump_config(config)
    assert "hf_canary" not in text and "pa55w0rd" not in text and "<redacted>" in text
    plain = dump_config(sft(learning_rate=3e-7, report_to=["tensorboard"]))
    path = write(tmp_path, plain)
    assert parse(SFTConfig, ["--config", path]) == sft(learning_rate=3e-7, report_to=["tensorboard"])
    assert yaml.safe_load(plain) == sft(learning_rate=3e-7, report_to=["tensorboard"]).to_dict()


# -- the command ---------------------------------------------------------------------------------------------------
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch):
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    for argv, fragment in {("stf",): "did you mean sft?", ("sft", "--sed", "1"): "did you mean seed?"}.items():
        assert cli.main(list(argv)) == 2
        shown = capsys.readouterr()
        assert fragment in shown.err and "Traceback" not in shown.err and shown.err.count("\n") == 1
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(ConfigError):
        cli.main(["stf"])


def test_foreign_errors_keep_their_traceback(monkeypatch):
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)

    def broken(argv):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.COMMANDS, "doctor", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_help_version_doctor(capsys):
    assert cli.main([]) == 0 and "quickstart" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("fastrl ")
    assert cli.main(["grpo", "--help"]) == 0 and "--num_generations int  [8]" in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0 and "torch" in capsys.readouterr().out


def test_the_command_line_loads_nothing_heavy():
    code = (
        "import sys; from fastrl.cli import main; main(['grpo', '--help']); "
        "bad = {'torch', 'transformers', 'datasets', 'matplotlib', 'numpy'} & set(sys.modules); "
        "sys.exit(f'loaded {bad}' if bad else 0)"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 5  # 0.1 s on an idle core


def test_run_takes_only_configs():
    with pytest.raises(TypeError, match="SFTConfig, DPOConfig, ...., got dict"):
        run({})
