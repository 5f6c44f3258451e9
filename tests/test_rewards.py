"""Rewards: found by name, called with what they ask for, and held to what they may return."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.rewards import RewardError, load_rewards, resolve
from fastrl.rewards.answers import final_answer, number, same_answer
from fastrl.rewards.builtin import accuracy, exact_answer, think_format


@dataclass
class FakePrompt:
    source: str | list
    columns: dict = field(default_factory=dict)


@dataclass
class FakeCompletion:
    ids: list[int]


class Letters:
    """Ids are letters; 0 is a special token."""

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(chr(96 + i) for i in ids if i or not skip_special_tokens) for ids in rows]


def score(specs, texts=("ab", "c", "ab"), weights=None, chat=False, **columns):
    prompts = [
        FakePrompt([{"role": "user", "content": f"p{i}"}] if chat else f"p{i}", {k: v[i] for k, v in columns.items()})
        for i in range(len(texts))
    ]
    completions = [FakeCompletion([ord(c) - 96 for c in text] + [0]) for text in texts]
    specs = specs if isinstance(specs, list) else [specs]
    return load_rewards(specs, weights, Letters()).score(prompts, completions)


# -- calling -------------------------------------------------------------------------------------------------------
def test_arguments_by_name_and_totals():
    def lengths(completion_ids):
        return [len(ids) for ids in completion_ids]

    def column(prompts, completions, answer):
        assert prompts == ["p0", "p1", "p2"] and completions == ["ab", "c", "ab"]
        return [None if a is None else float(a == c) for a, c in zip(answer, completions, strict=True)]

    def everything(prompts, completions, **columns):
        assert sorted(columns) == ["answer", "completion_ids"]
        return torch.tensor([0.5, 0.5, 0.5])

    out = score([lengths, column, everything], weights=[1.0, 10.0, 2.0], answer=["ab", "x", None])
    assert out.total.tolist() == [3 + 10 + 1, 2 + 0 + 1, 3 + 1]
    assert list(out.by_function) == ["lengths", "column", "everything"]
    assert out.by_function["column"].isnan().tolist() == [False, False, True]


def test_none_everywhere_is_unscored():
    out = score(lambda completions, **k: [None, 1.0, None])
    assert out.total.isnan().tolist() == [True, False, True] and out.total[1] == 1.0


def test_conversations_and_verl_functions():
    def chat(prompts, completions, **columns):
        assert prompts[0] == [{"role": "user", "content": "p0"}]
        return [float(c == [{"role": "assistant", "content": "ab"}]) for c in completions]

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        assert data_source == "d" and extra_info is None
        return {"score": float(solution_str == ground_truth), "acc": 1}

    columns = {"data_source": ["d"] * 3, "ground_truth": ["ab", "ab", "x"]}
    assert score([chat, compute_score], chat=True, **columns).total.tolist() == [2.0, 0.0, 1.0]
    nested = {"data_source": ["d"] * 3, "reward_model": [{"ground_truth": "ab"}] * 3}
    assert score(compute_score, **nested).total.tolist() == [1.0, 0.0, 1.0]


def test_async_functions_wait_together():
    class Slow:
        __name__ = "slow"

        async def __call__(self, completions, **columns):
            await asyncio.sleep(0.3)
            return [1.0] * len(completions)

    async def other(completions, **columns):
        await asyncio.sleep(0.3)
        return [2.0] * len(completions)

    began = time.monotonic()
    assert score([Slow(), other, "exact_answer"], answer=["ab"] * 3).total.tolist() == [4.0, 3.0, 4.0]
    assert time.monotonic() - began < 0.55


def test_arguments_are_copies():
    def vandal(prompts, completions, completion_ids, meta):
        prompts.clear(), completions.reverse(), completion_ids[0].clear(), meta[0].update(answer="changed")
        return [0.0] * 3

    def witness(prompts, completions, completion_ids, meta):
        assert len(prompts) == 3 and completions == ["ab", "c", "ab"]
        assert completion_ids[0] == [1, 2, 0] and meta[0] == {"answer": "kept"}
        return [1.0] * 3

    meta = [{"answer": "kept"}, {}, {}]
    assert score([vandal, witness], meta=meta).total.tolist() == [1.0] * 3
    assert meta[0] == {"answer": "kept"}


def test_two_functions_of_one_name_are_two_metrics():
    assert list(score(["exact_answer", "exact_answer"], answer=["ab"] * 3).by_function) == [
        "exact_answer",
        "exact_answer_2",
    ]


# -- what they may not do ------------------------------------------------------------------------------------------
BAD_RETURNS = {
    "one for all": ([1.0], "returned 1 rewards for 3 completions"),
    "too many": ([1.0] * 4, "returned 4 rewards for 3 completions"),
    "not a list": (1.0, r"returned 1\.0, expected a list of 3 floats"),
    "nothing": (None, "returned None, expected a list"),
    "dict": ({0: 1.0, 1: 1.0, 2: 1.0}, "returned {0: 1.0, 1: 1.0, 2: 1.0}, expected a list"),
    "nan": ([1.0, math.nan, 0.0], r"returned nan for sample 1 \(prompt 'p1', completion 'c'\)"),
    "inf": ([1.0, 0.0, -math.inf], "returned -inf for sample 2"),
    "string": ([1.0, "good", 0.0], "returned 'good' for sample 1"),
    "nested": ([1.0, [0.5], 0.0], r"returned \[0\.5\] for sample 1"),
    "tensor of wrong shape": (torch.ones(3, 1), r"returned \[1\.0\] for sample 0"),
    "complex": ([1j, 0, 0], "returned 1j for sample 0"),
}


@pytest.mark.parametrize("case", BAD_RETURNS)
def test_bad_returns_are_named(case):
    value, message = BAD_RETURNS[case]

    def grader(completions, **columns):
        return value

    with pytest.raises(RewardError, match="reward function grader " + message):
        score(grader)


@pytest.mark.parametrize("sort", ["plain", "async", "verl"])
def test_a_function_that_raises_is_named_with_its_sample(sort):
    def plain(completions, **columns):
        return [1 / (len(c) - 1) for c in completions]

    async def later(completions, **columns):
        return plain(completions)

    def compute_score(solution_str, ground_truth):
        return 1 / (len(solution_str) - 1)

    function = {"plain": plain, "async": later, "verl": compute_score}[sort]
    with pytest.raises(RewardError) as error:
        score(function)
    assert f"reward function {function.__name__} raised ZeroDivisionError: division by zero on" in str(error.value)
    if sort != "async":
        assert "sample 1 (prompt 'p1', completion 'c')" in str(error.value)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_exit_is_an_error_like_any_other():
    def leaves(completions, **columns):
        raise SystemExit(3)

    with pytest.raises(RewardError, match="leaves raised SystemExit: 3"):
        score(leaves)


def test_a_column_that_is_not_there_is_named():
    def needs(completions, solution):
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"needs needs solution, but the dataset has columns \['answer'\]"):
        score(needs, answer=["a"] * 3)
    with pytest.raises(RewardError, match="the dataset needs a column answer, solution, ground_truth"):
        score("exact_answer")


def test_long_texts_are_shortened_in_errors():
    with pytest.raises(RewardError) as error:
        score(lambda completions, **k: [math.nan] * 3, texts=("a" * 10_000, "b", "c"))
    assert len(str(error.value)) < 400


def test_weights():
    with pytest.raises(RewardError, match="weights must be 1 finite numbers"):
        load_rewards(["exact_answer"], [1.0, 2.0], Letters())
    with pytest.raises(RewardError, match="weights must be"):
        load_rewards(["exact_answer"], [math.nan], Letters())
    with pytest.raises(RewardError, match="no reward function"):
        load_rewards([], None, Letters())


# -- finding -------------------------------------------------------------------------------------------------------
def test_functions_from_files_modules_and_names(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("def good(completions, **k):\n    return [1.0] * len(completions)\nclass Odd: pass\n")
    assert score(f"{file}:good").total.tolist() == [1.0] * 3
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve("mine.good").name == "good"
    assert resolve("fastrl.rewards.builtin.accuracy").call is accuracy
    soft = score("soft_overlong:max_length=4,buffer=2", texts=("a", "abc", "abcdef"))
    assert soft.total.tolist() == [0.0, -1.0, -1.0]
    assert score("length:max_length=6").total.tolist() == pytest.approx([0.5, 1 - 2 / 6, 0.5])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("exact_anser", "did you mean exact_answer"),
        ("xyzzy", "built in are exact_answer"),
        ("no_such_package.f", "no module 'no_such_package'"),
        ("fastrl.rewards.builtin.f", "has no function 'f'"),
        ("fastrl.nothing.f", "no module 'fastrl.nothing'"),
        ("there/is/no.py:f", "does not exist"),
        ("some/file.py", "say which function"),
        ("soft_overlong", "should read soft_overlong:max_length=...,buffer=..."),
        ("soft_overlong:max_length=1e9,buffer=2", "should read"),
        ("exact_answer:x=1", "should read exact_answer"),
    ],
)
def test_what_cannot_be_found_is_said(spec, message):
    with pytest.raises(RewardError, match=message):
        resolve(spec)


def test_a_file_without_the_function(tmp_path):
    file = tmp_path / "mine2.py"
    file.write_text("def good(): pass\n")
    with pytest.raises(RewardError, match=r"no function 'bad'; it has \['good'\]"):
        resolve(f"{file}:bad")
    with pytest.raises(RewardError, match="a trainer opens reward models"):
        resolve(str(tmp_path))


# -- graders -------------------------------------------------------------------------------------------------------
def test_exact_answer_takes_nothing_but_the_answer():
    assert exact_answer(["42", " 42\n", "042", "42.", "=42", ""], answer=["42"] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert exact_answer(["42", "x"], solution=[None, "x"]) == [None, 1.0]
    assert exact_answer([[{"role": "assistant", "content": "42"}]], ground_truth=[42]) == [1.0]


@pytest.mark.parametrize(
    "text, truth, right",
    [
        (r"so it is \boxed{42}.", "42", True),
        (r"\boxed{41} no, \boxed{42}", "42", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{x^{2}+1}", "x^{2} + 1", True),
        (r"\boxed{x+1}", "1+x", False),  # no algebra
        ("thinking 7 ...\n#### 1,234", "1234", True),
        ("The answer is 12.", "12", True),
        ("Answer: $3.50", "3.5", True),
        ("Final answer: Paris", "paris", True),
        ("between 3 and 42", "42", True),
        ("42 or 3", "42", False),
        ("-7", "7", False),
        ("no idea", "42", False),
        (r"\boxed{42", "42", True),
        ("50%", "50", True),
        ("42", "so 40 + 2 gives #### 42", True),
        ("", "42", False),
    ],
)
def test_accuracy(text, truth, right):
    assert accuracy([text], answer=[truth]) == [float(right)]


def test_numbers_are_parsed_and_never_evaluated():
    assert number("1,234.50") == number("1234.5") and number("-1/4") == number("-.25") == number(r"-\frac{1}{4}")
    for text in ("9**9**9", "1e999999999", "1/0", "__import__('os')", "1,23", "", ".", "-", "9" * 65, "0x10", "1_000"):
        assert number(text) is None, text
    assert not same_answer("1e3", "1000") and same_answer("9" * 200, "9" * 200)


HOSTILE = [
    "9**9**9**9",
    "(" * 100_000,
    "\\boxed{" * 50_000,
    "\\boxed{" + "{" * 100_000,
    "\\frac{" * 50_000,
    "1" * 1_000_000,
    "1," * 500_000,
    "-" * 1_000_000,
    "#### " * 200_000,
    "<think>" * 200_000,
    "1/1" * 300_000,
    "__import__('os').system('touch /tmp/owned')",
    "().__class__.__bases__[0].__subclasses__()",
    "٣٤" * 1000,
    "\x00" * 1000 + "\ud800",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: t[:16].encode("ascii", "replace").decode())
def test_hostile_completions_cost_nothing(text):
    began = time.perf_counter()
    for grader in (accuracy, exact_answer, think_format):
        assert grader([text], answer=["42"]) == [0.0]
    assert time.perf_counter() - began < 0.05


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789.,/-+eE*{}\\boxedfrac#$% answeris:\n(<think>)", max_size=80), st.text(max_size=20))
def test_no_text_raises(text, truth):
    assert accuracy([text], answer=[truth])[0] in (0.0, 1.0)
    final_answer(text), number(text), same_answer(text, truth), think_format([text])


def test_think_format_is_trls():
    texts = ["<think>a</think>b", "<think>a", "a<think>b</think>", "<think><think></think>", "<think></think>"]
    assert think_format(texts) == [1.0, 0.0, 0.0, 0.0, 1.0]
    rewards = pytest.importorskip("trl.rewards")
    assert think_format(texts) == rewards.think_format_reward([[{"content": t}] for t in texts])
