"""Runs before any test module: one thread, and without an NVIDIA GPU the Triton kernels run in Triton's interpreter.

Tensors of this size gain nothing from more threads, and two processes whose threads spin for each other lose minutes.

The variable must be set before triton is first imported, and holds for the whole test process. Tests that compile
kernels (test_aot.py) do so in a process of their own, without it.
"""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads, here and in the processes that tests start

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_generate_tests(metafunc):
    """Modules that say `EACH_ROW_WORK = True` run twice: with the row work in C++ and with it in torch."""
    if getattr(metafunc.module, "EACH_ROW_WORK", False):
        metafunc.fixturenames.append("row_work")
        metafunc.parametrize("row_work", ["native", "torch"], indirect=True)


@pytest.fixture
def row_work(request, monkeypatch):
    """Which backend the CPU takes by default. Without a compiler there is only one, and both runs take it."""
    from fastrl.ops import dispatch

    if request.param == "torch":
        monkeypatch.setattr(dispatch, "has_native", lambda: False)
    elif shutil.which("g++"):
        assert dispatch.has_native(), "a compiler is here but csrc is not compiled: pip install -e ."
    return request.param
