"""The update inside the backward: the same weights as after it, gradients that never live together, bad ones caught."""

from __future__ import annotations

import json
import math

import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_optim import Net, apart, config, loss_of, same
from torch import nn

from fastrl.train import SFTConfig, run
from fastrl.train.optim import NonFiniteError, StepGuard, build_optimizer
from fastrl.train.optim.host import HostStates
from fastrl.train.optim.in_backward import InBackward

OPTIMIZERS = {
    "adamw_torch": {},
    "adamw_torch_fused": {},
    "adamw_torch_8bit": {},
    "adamw_torch_4bit": {},
    "muon": {},
    "sgd": {"learning_rate": 0.1},
    "adafactor": {},
    "kahan": {"bf16_update": "kahan", "dtype": "bfloat16"},
    "stochastic": {"bf16_update": "stochastic", "dtype": "bfloat16"},
}


def guarded(name="adamw_torch", net=None, in_backward=True, host=False, **changes):
    """(net, guard) of a named optimizer."""
    flags = {"learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.0, **OPTIMIZERS.get(name, {}), **changes}
    if name not in ("kahan", "stochastic"):
        flags["optim"] = name
    settings = config(optimizer_in_backward=in_backward, **flags)
    net = net or Net(torch.bfloat16 if "dtype" in flags else torch.float32)
    optimizer = build_optimizer(net, settings)
    guard = StepGuard.from_config(optimizer, net, settings)
    guard.host = HostStates(optimizer, torch.device("cpu")) if host else None
    return net, guard


def stepped(net, guard, micros, lr=1e-2):
    """One optimizer step; each micro-batch is the seed of its data, or a function of the net."""
    for micro, _ in guard.rounds(list(micros), lr):
        (micro(net) if callable(micro) else loss_of(net, micro)).backward()
    return guard.step(lr)


@pytest.mark.parametrize("micros", [1, 3])
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_weights_are_those_of_an_update_afterwards(name, host, micros):
    ours, inside = guarded(name, host=host)
    theirs, after = guarded(name, in_backward=False)
    for i in range(4):
        seeds = range(i * micros, (i + 1) * micros)
        one, two = stepped(ours, inside, seeds), stepped(theirs, after, seeds)
        assert one.grad_norm == pytest.approx(two.grad_norm, rel=1e-5) and not one.skipped
        assert all(p.grad is None for p in ours.parameters())
    assert same(ours, theirs) and apart(ours, Net()) > 1e-3
    assert inside.lr == 1e-2


@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
@pytest.mark.parametrize("micros", [1, 3])
def test_two_passes_clip_exactly_with_the_same_draws(micros, max_grad_norm):
    """Dropout on: a second pass with other masks would have another gradient than the one whose norm was taken."""
    ours, inside = guarded(max_grad_norm=max_grad_norm, clip_two_pass=True)
    theirs, after = guarded(in_backward=False, max_grad_norm=max_grad_norm)
    seen = []

    def noisy(net):
        out = nn.functional.dropout(net(torch.arange(39)), 0.5)
        seen.append(float(out.detach().sum()))
        return nn.functional.cross_entropy(out, torch.arange(1, 40))

    for i in range(3):
        results = []
        for net, guard in ((ours, inside), (theirs, after)):
            torch.manual_seed(i)
            results.append(stepped(net, guard, [noisy] * micros))
        assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-6)
    assert seen[:micros] == seen[micros : 2 * micros] and len(set(seen)) > micros
    assert apart(ours, theirs) < 1e-6 < apart(ours, Net())


def test_the_random_numbers_after_two_passes_are_those_after_one():
    draws = []
    for two in (True, False):
        net, guard = guarded(max_grad_norm=1.0, clip_two_pass=two, in_backward=two)
        torch.manual_seed(0)
        stepped(net, guard, [lambda net: nn.functional.dropout(net(torch.arange(39)), 0.5).square().mean()])
        draws.append(float(torch.rand(())))
    assert draws[0] == draws[1]


class Alive:
    """The most bytes of gradients alive at once, looked at whenever one is complete and before the guard takes it."""

    def __init__(self, net):
        self.net, self.most = net, 0
        for p in net.parameters():
            p.register_post_accumulate_grad_hook(self)

    def __call__(self, _):
        self.most = max(self.most, sum(p.grad.nbytes for p in self.net.parameters() if p.grad is not None))


@pytest.mark.parametrize("two", [False, True])
def test_gradients_never_live_together(two):
    net = Net()
    alive, sizes = Alive(net), [p.nbytes for p in net.parameters()]
    flags = {"max_grad_norm": 1.0, "clip_two_pass": True} if two else {}
    _, inside = guarded(net=net, **flags)
    stepped(net, inside, [0])
    assert alive.most == max(sizes)
    stepped(net, inside, [0, 1])  # of several micro-batches all gradients live until the last
    assert alive.most == sum(sizes)
    other = Net()
    alive = Alive(other)
    _, after = guarded(net=other, in_backward=False)
    stepped(other, after, [0])
    assert alive.most == sum(sizes)


def test_several_micro_batches_are_noted_once():
    net, guard = guarded()
    notes = [stepped(net, guard, range(n)).note for n in (1, 2, 2, 1)]
    assert [bool(n) for n in notes] == [False, True, False, False] and "max_tokens_per_device" in notes[1]


def test_gradients_of_early_micro_batches_alone_are_applied_too():
    """An expert that the last micro-batch does not use has its gradient from the ones before."""
    micros = [0, lambda net: net.norm.weight.sum() * 1e-3]
    ours, inside = guarded()
    theirs, after = guarded(in_backward=False)
    stepped(ours, inside, micros), stepped(theirs, after, micros)
    assert same(ours, theirs) and inside.hooks.done == {n for n, _ in ours.named_parameters()}


def test_tied_weights_are_updated_once():
    def tied():
        net = Net()
        net.down = nn.Linear(72, 128, bias=False)
        torch.manual_seed(4), nn.init.normal_(net.down.weight, std=0.1)
        net.head.weight = net.embed.weight
        return net

    ours, inside = guarded(net=tied())
    theirs, after = guarded(net=tied(), in_backward=False)
    for i in range(3):
        stepped(ours, inside, [i]), stepped(theirs, after, [i])
    assert same(ours, theirs) and apart(ours, tied()) > 1e-3


def test_a_gradient_that_comes_twice_is_refused():
    net, guard = guarded()
    with pytest.raises(RuntimeError, match="came twice in one backward"):
        for _ in guard.rounds([0], 1e-2):
            loss_of(net, 0).backward()
            loss_of(net, 1).backward()


def test_a_loop_without_rounds_is_refused():
    net, guard = guarded()
    loss_of(net, 0).backward()
    with pytest.raises(RuntimeError, match="guard.rounds"):
        guard.step(1e-2)


# -- gradients that are not finite -------------------------------------------------------------------------------------
def bad(net):
    """NaN in the gradient of one weight, which is the last to be reached."""
    return loss_of(net, 9) + (net.embed.weight[3, 3] - net.embed.weight[3, 3].detach()) * math.nan


def state_of(guard, p):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in guard.optimizer.state[p].items()}


def unchanged(before, after):
    return all(torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else v == after[k] for k, v in before.items())


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("host", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_pass_leaves_a_bad_parameter_alone(name, host, looks, monkeypatch):
    """looks False: as on a GPU, where the decision is made on the device."""
    if not looks:
        monkeypatch.setattr(InBackward, "_costs_nothing", lambda self, p: False)
    net, guard = guarded(name, host=host)
    stepped(net, guard, [0])
    weights = {n: p.detach().clone() for n, p in net.named_parameters()}
    states = {n: state_of(guard, p) for n, p in net.named_parameters()}
    outcome = stepped(net, guard, [bad])
    assert outcome.skipped and outcome.moved and outcome.culprits == ["embed.weight"]
    assert "the others have moved" in outcome.describe()
    after = {n: state_of(guard, p) for n, p in net.named_parameters()}
    for n, p in net.named_parameters():
        assert torch.equal(p, weights[n]) == (n == "embed.weight"), n
        assert unchanged(states[n], after[n]) == (n == "embed.weight" or not states[n]), n
    assert getattr(guard.optimizer, "found_inf", None) is None and all(p.grad is None for p in net.parameters())
    assert not stepped(net, guard, [1]).skipped and (guard.skipped, guard.in_a_row) == (1, 0)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("looks", [True, False])
def test_a_bad_first_step_makes_no_state(looks, monkeypatch):
    if not looks:
        monkeypatch.setattr(InBackward, "_costs_nothing", lambda self, p: False)
    net, guard = guarded("adamw_torch_8bit")
    assert stepped(net, guard, [bad]).skipped and not guard.optimizer.state.get(net.embed.weight)
    assert not stepped(net, guard, [0]).skipped and guard.optimizer.state[net.embed.weight]["step"] == 1
    assert guard.optimizer.state[net.up.weight]["step"] == 2


def test_two_passes_move_nothing():
    net, guard = guarded(max_grad_norm=1.0, clip_two_pass=True)
    stepped(net, guard, [0])
    before = Net()
    before.load_state_dict(net.state_dict())
    states = {n: state_of(guard, p) for n, p in net.named_parameters()}
    outcome = stepped(net, guard, [0, bad])
    assert outcome.skipped and not outcome.moved and outcome.culprits == ["embed.weight"] and not guard.moved
    assert same(net, before) and "weights are unchanged" in outcome.describe()
    assert all(unchanged(states[n], state_of(guard, p)) for n, p in net.named_parameters())
    assert not stepped(net, guard, [0]).skipped and not same(net, before)


def test_too_many_in_a_row_end_the_run():
    net, guard = guarded(max_skipped_steps=2)
    stepped(net, guard, [bad])
    with pytest.raises(NonFiniteError, match="2 steps in a row.*in 1 parameters: embed.weight.*others? .*have moved"):
        stepped(net, guard, [bad])


# -- in a run ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("in-backward")
    return {"model": tiny.make_model(root / "model"), **tiny.make_data(root / "data")}


def made(place, out, **options):
    shared = {"model_name_or_path": str(place["model"]), "dataset_name": str(place["sft"]), "learning_rate": 1e-2}
    shared |= {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 6, "save_strategy": "no", **options}
    path = run(SFTConfig(output_dir=str(out), **shared)).output_dir
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return load_file(path / "model.safetensors"), lines


WAYS = {  # of the same updates
    "one pass, no checkpointing": ({"max_grad_norm": 0, "gradient_checkpointing": False}, {}),
    "one pass, several micro-batches": ({"max_grad_norm": 0, "max_tokens_per_device": 20}, {}),
    "two passes, several micro-batches": ({"max_grad_norm": 0.1, "max_tokens_per_device": 20}, {"clip_two_pass": True}),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_the_same(way, place, tmp_path):
    shared, more = WAYS[way]
    after, told = made(place, tmp_path / "after", **shared)
    inside, told_too = made(place, tmp_path / "inside", optimizer_in_backward=True, **shared, **more)
    for name in after:
        torch.testing.assert_close(inside[name], after[name], rtol=1e-5, atol=1e-6)
    for one, two in zip(told, told_too, strict=True):
        assert one["num_tokens"] == two["num_tokens"]
        for key in ("loss", "grad_norm", "entropy"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)
