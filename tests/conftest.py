"""Runs before any test module: one thread, and without an NVIDIA GPU the Triton kernels run in Triton's interpreter.

Tensors of this size gain nothing from more threads, and two processes whose threads spin for each other lose minutes.

The variable must be set before triton is first imported, and holds for the whole test process. Tests that compile
kernels (test_aot.py) do so in a process of their own, without it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch loads, here and in the processes that tests start

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
