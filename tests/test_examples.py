"""Every file of examples/ runs, asserts what it claims, and says something."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


def test_there_are_examples():
    names = {path.stem for path in EXAMPLES}
    assert {"transformers_trainer", "bare_loop_nll", "bare_loop_grpo", "own_loss"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # what it writes goes away
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
    text = path.read_text()
    assert '"""' in text.splitlines()[0] and ("assert " in text or "assert_close" in text)
