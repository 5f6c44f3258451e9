"""Runs before any test module: without an NVIDIA GPU the Triton kernels run in Triton's interpreter.

The variable must be set before triton is first imported, and holds for the whole test process. Tests that compile
kernels (test_aot.py) do so in a process of their own, without it.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
