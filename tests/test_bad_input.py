"""What the command line says to bad input: one message that names the place, what came and the fix; exit code 2."""

from __future__ import annotations

import json

import pytest
import tiny

from fastrl.cli import main

GOOD = {"prompt": "1+1=", "completion": "2", "answer": "2"}
REWARDS = """
def raises(prompts, completions, **columns):
    return [1 / 0 for _ in completions]

def short(prompts, completions, **columns):
    return [1.0]

def not_a_number(prompts, completions, **columns):
    return [float("nan")] * len(completions)

def words(prompts, completions, **columns):
    return ["good"] * len(completions)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("bad") / "model")


@pytest.fixture
def fastrl(model, tmp_path, capsys):
    """Run a command on lines of JSONL; returns (exit code, what it printed)."""

    def call(command: str, lines: list[str] | None = None, *flags: str, **options) -> tuple[int, str]:
        data = tmp_path / "data.jsonl"
        if lines is not None:
            data.write_text("\n".join(lines) + ("\n" if lines else ""))
        words = {"model_name_or_path": model, "dataset_name": data, "output_dir": tmp_path / "out", "max_steps": 1}
        words |= {"max_completion_length": 4} if command == "grpo" else {}
        words |= options
        code = main([command, *(w for k, v in words.items() for w in (f"--{k}", str(v))), *flags])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def rows(*changes: dict) -> list[str]:
    return [json.dumps({**GOOD, **change}) for change in changes]


def test_malformed_lines_are_all_named_with_file_and_line(fastrl):
    code, said = fastrl("sft", [*rows({}), '{"prompt": oops', *rows({"completion": 3})])
    assert code == 2 and "data.jsonl:2" in said and "data.jsonl:3" in said and "Traceback" not in said


@pytest.mark.parametrize("lines", [[], None])
def test_no_data(fastrl, lines):
    code, said = fastrl("sft", lines)
    assert code == 2 and "data.jsonl" in said and ("empty" in said or "does not exist" in said)


def test_an_unknown_flag_is_refused_with_the_nearest(fastrl):
    code, said = fastrl("sft", rows({}), "--learning_rat", "1")
    assert code == 2 and "learning_rat" in said and "did you mean learning_rate" in said


def test_an_unknown_yaml_key_is_refused_with_the_nearest(fastrl, tmp_path):
    (tmp_path / "c.yaml").write_text("per_device_train_batchsize: 8\n")
    code, said = fastrl("sft", rows({}), "--config", str(tmp_path / "c.yaml"))
    assert code == 2 and "per_device_train_batchsize" in said and "did you mean per_device_train_batch_size" in said


def test_a_missing_model_is_named(fastrl, tmp_path):
    code, said = fastrl("sft", rows({}), model_name_or_path=tmp_path / "nowhere")
    assert code == 2 and "nowhere" in said and "Traceback" not in said


def test_columns_of_another_stage_are_named(fastrl):
    code, said = fastrl("dpo", rows({}))
    assert code == 2 and "chosen" in said and "completion" in said


@pytest.mark.parametrize("name", ["raises", "short", "not_a_number", "words"])
def test_a_wrong_reward_function_stops_with_its_name_and_the_sample(fastrl, tmp_path, name):
    (tmp_path / "rewards.py").write_text(REWARDS)
    code, said = fastrl("grpo", rows({}), reward_funcs=f"{tmp_path / 'rewards.py'}:{name}")
    assert code == 2 and f"reward function {name}" in said and "sample 0" in said and "1+1=" in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_an_unknown_reward_is_refused_with_the_nearest(fastrl):
    code, said = fastrl("grpo", rows({}), reward_funcs="exact_answr")
    assert code == 2 and "exact_answer" in said


def test_a_prompt_beyond_the_context_is_dropped_counted_and_listed(fastrl, tmp_path):
    code, said = fastrl("sft", rows({}, {"prompt": "1" * 80 + "="}, {}))
    assert code == 0 and "dropped 1 of 3" in said and "data.jsonl:2" in said


def test_too_many_dropped_rows_stop_the_run(fastrl):
    code, said = fastrl("sft", rows({}, {"prompt": "1" * 80 + "="}, {"prompt": "2" * 80 + "="}))
    assert code == 2 and "2 of 3" in said and "max_dropped_fraction" in said


def test_an_empty_completion_trains_its_end_and_nothing_else(fastrl, tmp_path):
    code, _ = fastrl("sft", rows({"completion": ""}, {"completion": ""}))
    record = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert code == 0 and record["loss"] > 0


def test_an_empty_prompt_is_refused_for_sampling(fastrl):
    code, said = fastrl("grpo", rows({"prompt": ""}), reward_funcs="exact_answer")
    assert code == 2 and "empty" in said


def test_a_used_output_dir_is_not_overwritten(fastrl):
    assert fastrl("sft", rows({}))[0] == 0
    code, said = fastrl("sft", rows({}))
    assert code == 2 and "--overwrite_output_dir" in said and "--resume_from_checkpoint" in said
