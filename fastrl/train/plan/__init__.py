"""`fastrl plan`: where the bytes of a run will go, before anything is loaded.

Activations come from the training code itself, run on tensors without data while every storage is counted (liveness,
trace, curves); weights, optimizer states and the head's workspace are sizes that are known (estimate).
"""

from fastrl.train.plan.device import Device, device_of
from fastrl.train.plan.estimate import Estimate, MemoryModel
from fastrl.train.plan.switches import fit, tried

__all__ = ["Device", "Estimate", "MemoryModel", "device_of", "fit", "tried"]
