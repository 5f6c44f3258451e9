"""Optimizers on weights that are split over two ranks: what one process makes of them, and the same bytes in all."""

from __future__ import annotations

import copy
import json
import math
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_optim import config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fastrl.train.flags import ConfigError
from fastrl.train.optim import StepGuard, build_optimizer, global_norm

SHAPES = {"a": (65, 200), "b": (1, 4096), "c": (7,), "d": (3, 20, 70), "e": (64, 256)}
FLAGS = {"learning_rate": 1e-2, "weight_decay": 0.1}
BF16 = {"dtype": "bfloat16"}
OPTIMIZERS = {
    "adamw_torch": {},
    "adamw_torch_fused": {"optim": "adamw_torch_fused"},
    "8bit": {"optim": "adamw_torch_8bit"},
    "4bit": {"optim": "adamw_torch_4bit"},
    "kahan": {"bf16_update": "kahan", **BF16},
    "stochastic": {"bf16_update": "stochastic", **BF16},
    "kahan 8bit": {"bf16_update": "kahan", "optim": "adamw_torch_8bit", **BF16},
    "sgd": {"optim": "sgd"},
}
MESHES = {"split": ((2,), [Shard(0)]), "copies": ((2, 1), [Replicate(), Shard(0)])}


class Holder(nn.Module):
    """Weights without a use; every rank gives them the same gradients."""

    def __init__(self, dtype, mesh=None, placements=()):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=draw).to(dtype)
            value = value if mesh is None else distribute_tensor(value, mesh, placements)
            self.register_parameter(name, nn.Parameter(value))

    def give(self, seed):
        draw = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            g = torch.randn(SHAPES[name], generator=draw).to(p.dtype) * 10.0 ** (seed % 3)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def updated(options, mesh=None, placements=(), steps=4):
    """(weights, states, norms) as whole plain tensors."""
    settings = config(**FLAGS, **options)
    model = Holder(torch.bfloat16 if options.get("dtype") else torch.float32, mesh, placements)
    optimizer = build_optimizer(model, settings)
    guard, norms = StepGuard.from_config(optimizer, model, settings), []
    for i in range(steps):
        model.give(i)
        norms.append(guard.step(1e-2).grad_norm)
    whole = lambda x: x.full_tensor() if isinstance(x, DTensor) else x  # noqa: E731
    named = dict(model.named_parameters())
    weights = {n: whole(p.detach()) for n, p in named.items()}
    return weights, {n: {k: whole(v) for k, v in optimizer.state[p].items()} for n, p in named.items()}, norms


def exact(name, mesh, placements):
    """Weights, moments, codes, scales, remainders, with clipping; whatever rows a rank holds."""
    alone, states, norms = updated(OPTIMIZERS[name])
    split, split_states, split_norms = updated(OPTIMIZERS[name], mesh, placements)
    assert split_norms == pytest.approx(norms, rel=1e-5) and not all(n == norms[0] for n in norms)
    for n in alone:
        few_differ(split[n], alone[n], n)
        assert split_states[n].keys() == states[n].keys()
        for k, v in states[n].items():
            if isinstance(v, int) or v.dim() == 0:
                assert split_states[n][k] == v
            else:
                assert split_states[n][k].shape == v.shape and split_states[n][k].dtype == v.dtype
                few_differ(split_states[n][k], v, (n, k))


def few_differ(x, y, where):
    """Rounding takes another way where norms that differ in their last bit scale a value across a border."""
    different = (x.float() - y.float()).abs() > 1e-5 * y.float().abs().max()
    assert different.float().mean() < 0.02, where


def without_clipping(name, mesh, placements):
    """Bit for bit: not even the order of a sum can differ."""
    options = {**OPTIMIZERS[name], "max_grad_norm": 0}
    (alone, states, _), (split, split_states, _) = updated(options), updated(options, mesh, placements)
    for n in alone:
        assert torch.equal(alone[n], split[n]), n
        for k, v in states[n].items():
            assert torch.equal(v, split_states[n][k]) if isinstance(v, torch.Tensor) else v == split_states[n][k], (
                n,
                k,
            )


class Pair(nn.Module):
    """Two matrices for Muon, wide and tall, and a bias; weights split by rows."""

    def __init__(self, mesh=None):
        super().__init__()
        torch.manual_seed(5)
        self.up, self.down = nn.Linear(40, 65), nn.Linear(65, 30, bias=False)
        for module in (self.up, self.down) if mesh is not None else ():
            for name, p in list(module.named_parameters()):
                setattr(module, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))

    def give(self, seed):
        draw = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            g = torch.randn(p.shape, generator=draw)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def muon(world, rank):
    """The same gradients: torch.optim.Muon's weights and momenta. (Gradients that differ in the last bit would not do:
    orthogonalising blows up what is small.)"""
    settings = config(**FLAGS, optim="muon", max_grad_norm=0, muon_learning_rate=3e-2)
    made = []
    for mesh in (None, init_device_mesh("cpu", (world,))):
        model = Pair(mesh)
        optimizer = build_optimizer(model, settings)
        guard = StepGuard.from_config(optimizer, model, settings)
        for i in range(4):
            model.give(i)
            guard.step(1e-2)
        found = [p.detach() for p in model.parameters()]
        found += [optimizer.state[m.weight]["momentum_buffer"] for m in (model.up, model.down)]
        made.append([x.full_tensor() if isinstance(x, DTensor) else x for x in found])
    for alone, split in zip(*made, strict=True):
        torch.testing.assert_close(split, alone, rtol=1e-6, atol=1e-7)
    assert all(float((a - b).abs().max()) > 1e-2 for a, b in zip(made[0], Pair().parameters(), strict=False))


# -- under FSDP2 -------------------------------------------------------------------------------------------------------
class Body(nn.Module):
    """Layers whose rows two ranks cannot share evenly; one of them is used by the others' output too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList([nn.Linear(70, 71), nn.Linear(71, 70), nn.Linear(70, 70)])
        self.norm, self.out = nn.LayerNorm(70), nn.Linear(70, 5, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).tanh()
        return self.out(self.norm(x))


TRAINED = {
    "adamw_torch": {},
    "8bit": {"optim": "adamw_torch_8bit"},
    "in backward": {"optimizer_in_backward": True, "max_grad_norm": 0},
    "in backward, 8bit": {"optimizer_in_backward": True, "max_grad_norm": 0, "optim": "adamw_torch_8bit"},
    "two passes": {"optimizer_in_backward": True, "clip_two_pass": True, "max_grad_norm": 0.5},
}
CASES = [*TRAINED, *(f"{name}, 3 micro-batches" for name in TRAINED if "8bit" not in name)]


def fit(name, world, rank, spoil=-1):
    """(weights, norms, outcomes) of five steps over twelve rows that the ranks share."""
    name, _, several = name.partition(", 3 ")
    settings = config(**{**FLAGS, **TRAINED[name]})
    model = Body()
    if world > 1:
        for layer in (*model.layers, model):
            fully_shard(layer)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    guard = StepGuard.from_config(build_optimizer(model, settings), model, settings)
    draw, outcomes = torch.Generator().manual_seed(3), []
    for step in range(5):
        x, y = torch.randn(12, 70, generator=draw), torch.randn(12, 5, generator=draw)
        mine = [list(range(rank, 12, world))[i :: 3 if several else 1] for i in range(3 if several else 1)]
        for rows, _ in guard.rounds(mine, 1e-2):
            loss = (model(x[rows]) - y[rows]).square().sum() / 60
            (loss * math.nan if step == spoil and rank == world - 1 else loss).backward()
        outcomes.append(guard.step(1e-2))
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}
    steps = {n: guard.optimizer.state[p].get("step") for n, p in model.named_parameters()}
    return weights, outcomes, {n: -1 if s is None else int(s) for n, s in steps.items()}


def together(name, world, rank):
    alone, one, _ = fit(name, 1, 0)
    split, many, _ = fit(name, world, rank)
    loose = "8bit" in name  # codes jump where sums differ in the last bit
    for i, (a, b) in enumerate(zip(one, many, strict=True)):
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3 if loose and i else 1e-5)
    for n in alone:
        torch.testing.assert_close(split[n], alone[n], rtol=0, atol=1e-3 if loose else 2e-5, msg=n)
    assert max(float((alone[n] - p).abs().max()) for n, p in Body().named_parameters()) > 1e-2


def spoiled(name, world, rank):
    """One rank's NaN: every rank leaves the same weights alone and counts the same steps."""
    weights, outcomes, steps = fit(name, world, rank, spoil=2)
    told = json.dumps([outcomes[2].culprits, steps])
    made = [None] * world
    dist.all_gather_object(made, told)
    assert [o.skipped for o in outcomes] == [False, False, True, False, False]
    assert all(w.isfinite().all() for w in weights.values())
    assert made == [told] * world and outcomes[2].culprits
    assert set(steps.values()) == {4}


def culprits_differ(world, rank):
    """Only the rows of the last rank are bad: the first rank leaves its own alone too."""
    mesh = init_device_mesh("cpu", (world,))
    settings = config(**FLAGS, optimizer_in_backward=True, max_grad_norm=0)
    model = Holder(torch.float32, mesh, [Shard(0)])
    guard = StepGuard.from_config(build_optimizer(model, settings), model, settings)
    before = {n: p.to_local().clone() for n, p in model.named_parameters()}
    for _ in guard.passes(1e-2):
        model.give(0)
        if rank == world - 1:
            model.a.grad.to_local()[0, 0] = math.nan
    outcome = guard.step(1e-2)
    assert outcome.culprits == ["a"] and outcome.moved
    assert torch.equal(model.a.to_local(), before["a"]) and not guard.optimizer.state.get(model.a)
    assert model.e.to_local().numel() and not torch.equal(model.e.to_local(), before["e"])


def norms(world, rank):
    mesh = init_device_mesh("cpu", (world,))
    model = Holder(torch.float32, mesh, [Shard(0)])
    model.give(1)
    plain = torch.full((3,), 2.0)
    gradients = [p.grad for p in model.parameters()] + [plain]
    truth = math.sqrt(sum(float(p.grad.full_tensor().double().square().sum()) for p in model.parameters()) + 12)
    assert global_norm(gradients).item() == pytest.approx(truth, rel=1e-6)


def refused(world, rank):
    mesh = init_device_mesh("cpu", (world,))
    model = Holder(torch.float32, mesh, [Shard(0)])
    with pytest.raises(ConfigError, match="split over ranks"):
        build_optimizer(model, config(optim="adafactor"))
    body = fully_shard(Body())
    with pytest.raises(ConfigError, match="gathers each matrix"):
        build_optimizer(body, config(optim="muon", optimizer_in_backward=True, max_grad_norm=0))


def everything(folder: Path) -> None:
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.use_deterministic_algorithms(True)
    meshes = {name: (init_device_mesh("cpu", shape), placed) for name, (shape, placed) in MESHES.items()}
    jobs = [(f"{kind.__name__} {name} {where}", kind, (name, *meshes[where]))
            for name in OPTIMIZERS for where in MESHES for kind in (exact, without_clipping)]  # fmt: skip
    jobs += [(f"together {name}", together, (name, world, rank)) for name in CASES]
    jobs += [(f"spoiled {name}", spoiled, (name, world, rank)) for name in ("adamw_torch", "in backward", "two passes")]
    jobs += [(kind.__name__, kind, (world, rank)) for kind in (muon, culprits_differ, norms, refused)]
    verdicts = {}
    for label, job, args in jobs:
        verdicts[label] = verdict(job, args)
    (folder / f"verdicts-{rank}.json").write_text(json.dumps(verdicts))


def verdict(job, args) -> str:
    """Empty, or what is wrong. A rank that fails before a collective would leave the other one waiting: comparisons
    come last in every job."""
    try:
        job(*copy.copy(args))
    except AssertionError:
        return traceback.format_exc()[-2000:]
    return ""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("optim-world")
    run_ranks(2, everything, folder)
    return [json.loads((folder / f"verdicts-{rank}.json").read_text()) for rank in range(2)]


LABELS = [f"{kind} {name} {where}" for name in OPTIMIZERS for where in MESHES for kind in ("exact", "without_clipping")]
LABELS += [f"together {name}" for name in CASES]
LABELS += [f"spoiled {name}" for name in ("adamw_torch", "in backward", "two passes")]
LABELS += ["muon", "culprits_differ", "norms", "refused"]


@pytest.mark.parametrize("label", LABELS)
def test_two_ranks(label, verdicts):
    assert [told[label] for told in verdicts] == ["", ""]


def test_every_verdict_is_read(verdicts):
    assert set(verdicts[0]) == set(LABELS)
