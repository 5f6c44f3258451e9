"""The optimizer of a run: which one, the learning rate of each step, and the guarded step itself.

Every optimizer here is one torch.optim.Optimizer whose states are plain tensors (or DTensors split by rows as their
parameter is) and numbers, by name: what a checkpoint can hold and another number of processes can cut differently.
"""

from fastrl.train.optim.build import build_optimizer, notes_of
from fastrl.train.optim.groups import decay_names, muon_names
from fastrl.train.optim.guard import NonFiniteError, StepGuard, StepOutcome
from fastrl.train.optim.norm import clip_gradients, global_norm, local
from fastrl.train.optim.schedule import Schedule

__all__ = [
    "NonFiniteError",
    "Schedule",
    "StepGuard",
    "StepOutcome",
    "build_optimizer",
    "clip_gradients",
    "decay_names",
    "global_norm",
    "local",
    "muon_names",
    "notes_of",
]
