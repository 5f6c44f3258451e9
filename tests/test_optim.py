"""Optimizers against torch's, torchao's and transformers' own, and what each keeps of a weight."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from fastrl.models.head import LMHead
from fastrl.train import SFTConfig, run
from fastrl.train.flags import ConfigError, parse
from fastrl.train.optim import StepGuard, build_optimizer, codecs, decay_names, muon_names, notes_of, sliced
from fastrl.train.optim.host import HostStates
from fastrl.train.optim.noise import noise, round_randomly
from fastrl.train.optim.sliced import Kept, SlicedAdamW, cuts

NUMBERS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7}


def config(**changes):
    return SFTConfig(model_name_or_path="m", dataset_name="d", output_dir="o", **changes)


class Net(nn.Module):
    """Every kind of parameter; matrices large enough for codes, one with rows that end in the middle of a block."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(40, 128)
        self.up, self.norm = nn.Linear(128, 72), nn.LayerNorm(72)
        self.down = nn.Linear(72, 100, bias=False)
        with torch.device("meta"):
            self.head = LMHead(100, 40, bias=False)
        self.head.weight = nn.Parameter(torch.randn(40, 100) / 10)
        self.to(dtype)

    def forward(self, ids):
        return nn.Linear.forward(self.head, self.down(self.norm(self.up(self.embed(ids)).tanh())))


def loss_of(net, seed):
    """Learn to say the next number."""
    ids = torch.randint(0, 39, (64,), generator=torch.Generator().manual_seed(seed))
    return nn.functional.cross_entropy(net(ids).float(), ids + 1)


def trained(net, optimizer, steps=5, first=0):
    losses = []
    for i in range(first, first + steps):
        loss = loss_of(net, i)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def two_groups(net, decay=0.1):
    decayed = decay_names(net)
    split = [[p for n, p in net.named_parameters() if (n in decayed) == x] for x in (True, False)]
    return [{"params": split[0], "weight_decay": decay}, {"params": split[1], "weight_decay": 0.0}]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def apart(a, b):
    return max(float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# -- against the originals -------------------------------------------------------------------------------------------
FLAGS = {"weight_decay": 0.1, "learning_rate": 1e-2, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-7}


def adafactor(groups):
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=1e-2, scale_parameter=False, relative_step=False)


ORIGINALS = {
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, **NUMBERS),
    "adamw_torch_fused": lambda groups: torch.optim.AdamW(groups, **NUMBERS, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2),
    "adafactor": adafactor,
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_named_optimizer_is_the_original(name):
    ours, theirs = Net(), Net()
    trained(ours, build_optimizer(ours, config(optim=name, **FLAGS)))
    trained(theirs, ORIGINALS[name](two_groups(theirs)))
    assert same(ours, theirs) and apart(ours, Net()) > 1e-3


@pytest.mark.parametrize("size", [1 << 22, 1000])
def test_adamw_in_slices_is_torchs_bit_for_bit(size, monkeypatch):
    monkeypatch.setattr(sliced, "SLICE", size)
    monkeypatch.setattr(sliced, "COLUMNS", min(size, 256))
    ours, theirs = Net(), Net()
    trained(ours, SlicedAdamW(two_groups(ours), Kept(), **NUMBERS))
    trained(theirs, torch.optim.AdamW(two_groups(theirs), foreach=False, **NUMBERS))
    assert same(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 7), (5, 0), (1, 1), (7, 1000), (3000, 5), (3, 5_000_000)])
def test_cuts_cover_everything_once(shape):
    seen = Counter()
    for cut in cuts(*shape):
        size = (cut.rows.stop - cut.rows.start) * (cut.cols.stop - cut.cols.start)
        assert cut.cols.start % 256 == 0 and 0 <= size <= sliced.SLICE
        seen["elements"] += size
        seen[cut.rows.start, cut.cols.start] += 1
    assert seen.pop("elements", 0) == shape[0] * shape[1] and set(seen.values()) <= {1}


# -- few bits --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.25)])
def test_few_bits_learn_like_float32(bits, tolerance):
    ours, theirs = Net(), Net()
    small = trained(ours, build_optimizer(ours, config(optim=f"adamw_torch_{bits}bit", learning_rate=3e-3)), 40)
    large = trained(theirs, build_optimizer(theirs, config(learning_rate=3e-3)), 40)
    assert large[-1] < 0.6 * large[0]
    assert abs(small[-1] - large[-1]) < tolerance * (large[0] - large[-1])
    assert not same(ours, theirs)


@pytest.mark.parametrize("bits", [8, 4])
def test_states_are_as_small_as_they_say(bits):
    net = Net()
    optimizer = build_optimizer(net, config(optim=f"adamw_torch_{bits}bit"))
    trained(net, optimizer, 1)
    for name, p in net.named_parameters():
        stored = sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
        if p.dim() < 2 or p.numel() < 4096:
            assert stored == 8 * p.numel()
            continue
        rows, cols = p.shape
        blocks = math.ceil(cols / {8: 256, 4: 128}[bits])
        assert stored == 2 * rows * (math.ceil(cols * bits / 8) + 4 * blocks), name
        assert stored < 8 * p.numel() * bits / 32 * 1.2


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_torchaos_where_the_blocks_are(bits):
    """Rows of 256 values: its blocks and ours are the same."""
    import torchao.optim

    torch.manual_seed(0)
    start, gradients = torch.randn(48, 256), torch.randn(4, 48, 256)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    made = sliced.BY_STATES[f"{bits}bit"]([{"params": [ours]}], Kept(f"{bits}bit"), weight_decay=0.1, **NUMBERS)
    cls = {8: torchao.optim.AdamW8bit, 4: torchao.optim.AdamW4bit}[bits]
    original = cls([theirs], weight_decay=0.1, **NUMBERS)
    with torch.compiler.set_stance("force_eager"):
        for g in gradients:
            ours.grad, theirs.grad = g.clone(), g.clone()
            made.step(), original.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for name in ("exp_avg", "exp_avg_sq"):
        codes = original.state[theirs][name].codes.view(48, -1)
        assert (made.state[ours][name] != codes).float().mean() < 0.001


def test_a_codec_reads_what_it_wrote():
    """Within half the distance of the levels (from 0: to 1/16); cut by cut, rows ending inside a block."""
    torch.manual_seed(1)
    p, x = torch.zeros(70, 300), torch.randn(70, 300) * torch.logspace(-6, 3, 70)[:, None]
    for bits, signed, worst in ((8, True, 0.02), (8, False, 0.02), (4, True, 0.3), (4, False, 0.0626)):
        codec, values = codecs.Blocks(bits, signed), x if signed else x.abs()
        parts = codec.new(p)
        assert not codec.read(parts, codecs.Cut(slice(0, 70), slice(0, 300))).any()
        for cut in (codecs.Cut(slice(a, a + 35), slice(b, c)) for a in (0, 35) for b, c in ((0, 256), (256, 300))):
            for where, what in codec.write(parts, cut, values[cut.rows, cut.cols], None):
                where.copy_(what)
            largest = values[cut.rows, cut.cols].abs().amax(1, keepdim=True)
            error = (codec.read(parts, cut) - values[cut.rows, cut.cols]).abs() / largest
            assert error.max() < worst and codec.read(parts, cut).shape == error.shape


# -- bfloat16 weights --------------------------------------------------------------------------------------------------
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}


def small_updates(make, dtype=torch.bfloat16, lr=2e-5):
    """Weights between 1/2 and 2 that move by 300 lr in as many steps, by far less than 1/256 of them at a time."""
    p = nn.Parameter(torch.linspace(0.5, 2, 8192).view(64, 128).bfloat16().to(dtype))
    optimizer = make([{"params": [p], "weight_decay": 0.0}], lr=lr, **ADAM)
    draw = torch.Generator().manual_seed(5)
    for _ in range(300):
        p.grad = (1 + 0.1 * torch.randn(p.shape, generator=draw)).bfloat16().to(dtype)
        optimizer.step()
    return p.detach(), optimizer.state[p]


def kept(weights):
    return lambda groups, **numbers: SlicedAdamW(groups, Kept("bfloat16", weights, 7), **numbers)


@pytest.mark.parametrize("lr", [2e-5, 1e-6])
def test_bfloat16_weights_follow_float32_ones(lr):
    before = torch.linspace(0.5, 2, 8192).view(64, 128).bfloat16().float()
    truth = small_updates(torch.optim.AdamW, torch.float32, lr)[0] - before
    assert float(truth.mean()) == pytest.approx(-300 * lr, rel=0.02)
    plain, _ = small_updates(torch.optim.AdamW, lr=lr)
    assert torch.equal(plain.float(), before)
    kahan, state = small_updates(kept("kahan"), lr=lr)
    exact = kahan.float() + state["compensation"].float() - before
    assert float(exact.mean()) == pytest.approx(float(truth.mean()), rel=0.02)
    assert float((exact - truth).abs().max()) < 2**-8 * 0.1  # far closer than bfloat16 is
    random, _ = small_updates(kept("stochastic"), lr=lr)
    spread = 5 * math.sqrt(300 * lr * 2**-7 / 8192)  # of the mean of random walks with such steps
    assert abs(float((random.float() - before - truth).mean())) < spread < 0.6 * 300 * lr
    assert state["exp_avg_sq"].dtype == kahan.dtype == torch.bfloat16


def second_moment(steps=300):
    """Of a first gradient of 60 and then ones, over the true one: it falls by less than 1/256 a step."""
    p = nn.Parameter(torch.zeros(64, 128, dtype=torch.bfloat16))
    optimizer = kept("stochastic")([{"params": [p], "weight_decay": 0.0}], lr=1e-3, **ADAM)
    for i in range(steps):
        p.grad = torch.full_like(p, 1.0 if i else 60.0)
        optimizer.step()
    truth = 3.6 * 0.999 ** (steps - 1) + 1 - 0.999 ** (steps - 1)
    return float(optimizer.state[p]["exp_avg_sq"].float().mean()) / truth


def test_the_second_moment_goes_on_falling():
    assert second_moment() == pytest.approx(1, rel=0.01)


def test_rounding_moments_and_remainders_to_nearest_would_lose_them(monkeypatch):
    """The planted mistake: it shows in the tests above."""
    monkeypatch.setattr(codecs, "round_randomly", lambda x, bits: x.bfloat16())
    assert second_moment() > 1.15
    monkeypatch.setattr(sliced, "round_randomly", lambda x, bits: x.bfloat16())
    p, state = small_updates(kept("kahan"), lr=1e-6)
    start = torch.linspace(0.5, 2, 8192).view(64, 128).bfloat16().float()
    exact = p.float() + state["compensation"].float() - start
    assert float(exact.mean()) > -0.9 * 300e-6


def test_rounding_is_right_in_the_mean_and_only_between_neighbours():
    count, values = 20_000, [1.0, 1.0 + 2**-9, -1.0 - 2**-10, 1 + 127 / 128 + 2**-8 * 0.9]
    x = torch.tensor([values]).expand(count, -1)
    draws = round_randomly(x, noise(range(count), range(len(values)), 5, torch.device("cpu")) & 0xFFFF).float()
    step = x[0].abs().log2().floor().exp2() * 2**-7
    assert ((draws - x).abs() < step).all() and set(draws[:, 0].tolist()) == {1.0}
    assert ((draws.mean(0) - x[0]).abs() <= 5 * step / 2 / math.sqrt(count)).all()


def test_noise_is_of_the_place_in_the_whole_weight():
    cpu = torch.device("cpu")
    whole = noise(range(64), range(300), 11, cpu)
    assert torch.equal(noise(range(20, 33), range(256, 300), 11, cpu), whole[20:33, 256:300])
    assert (noise(range(64), range(300), 12, cpu) == whole).float().mean() < 1e-3
    for half in (whole & 0xFFFF, (whole >> 16) & 0xFFFF):
        assert float(half.float().mean()) == pytest.approx(2**15, rel=0.02)
        assert float(half.float().std()) == pytest.approx(2**16 / math.sqrt(12), rel=0.02)
    bits = ((whole[:, :, None] >> torch.arange(32)) & 1).float().flatten(0, 1)
    assert (bits.mean(0) - 0.5).abs().max() < 0.02
    assert (torch.corrcoef(bits.T) - torch.eye(32)).abs().max() < 0.05
    flat = whole.float().flatten()
    assert abs(float(torch.corrcoef(torch.stack([flat[1:], flat[:-1]]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(torch.stack([flat[300:], flat[:-300]]))[0, 1])) < 0.03


# -- muon --------------------------------------------------------------------------------------------------------------
def test_muon_moves_matrices_of_the_body_and_adamw_the_rest():
    ours, theirs = Net(), Net()
    assert muon_names(ours) == {"up.weight", "down.weight"}
    flags = {**FLAGS, "muon_learning_rate": 3e-2, "muon_momentum": 0.9}
    optimizer = build_optimizer(ours, config(optim="muon", **flags))
    assert isinstance(optimizer, torch.optim.Optimizer)
    guard = StepGuard(optimizer, ours.named_parameters(), 0.0)
    matrices = [theirs.up.weight, theirs.down.weight]
    rest = [[theirs.embed.weight, theirs.head.weight], [theirs.up.bias, theirs.norm.weight, theirs.norm.bias]]
    options = {"weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    originals = [
        torch.optim.Muon(matrices, lr=3e-2, **options),
        torch.optim.AdamW([{"params": p, "weight_decay": d} for p, d in zip(rest, (0.1, 0), strict=True)], **NUMBERS),
    ]
    for i in range(5):
        for net in (ours, theirs):
            loss_of(net, i).backward()
        guard.step(1e-2 * (i + 1))
        for original, rate in zip(originals, (3e-2, 1e-2), strict=True):
            for group in original.param_groups:
                group["lr"] = rate * (i + 1)
            original.step(), original.zero_grad()
    assert same(ours, theirs) and guard.lr == 5e-2


def test_muon_leaves_a_tied_head_and_adapters_alone():
    net = Net()
    net.head.weight = nn.Parameter(torch.zeros(40, 128))
    net.embed.weight = net.head.weight
    net.lora_A = nn.ModuleDict({"default": nn.Linear(128, 8, bias=False)})
    assert muon_names(net) == {"up.weight", "down.weight"}
    net.up.requires_grad_(False), net.down.requires_grad_(False)
    with pytest.raises(ConfigError, match="no weight of a linear layer"):
        build_optimizer(net, config(optim="muon"))


# -- states in the CPU's memory ----------------------------------------------------------------------------------------
OFFLOADED = {"adamw_torch": {}, "adamw_torch_8bit": {}, "muon": {}, "adafactor": {}}


@pytest.mark.parametrize("name", OFFLOADED)
def test_states_that_visit_the_device_change_nothing(name, monkeypatch):
    """Here both places are the CPU; copies stand for those on a device, and no more than three sets of them live."""
    live, most = Counter(), [0]
    fetch, send = HostStates._fetch, HostStates._send_back

    def fetched(self, p):
        live[id(p)] += 1
        most[0] = max(most[0], sum(live.values()))
        return fetch(self, p)

    def sent(self, p, homes):
        assert all(self.optimizer.state[p][k] is not v for k, v in homes.items())
        done = send(self, p, homes)
        assert all(self.optimizer.state[p][k] is v for k, v in homes.items())
        live[id(p)] -= 1
        return done

    monkeypatch.setattr(HostStates, "_fetch", fetched)
    monkeypatch.setattr(HostStates, "_send_back", sent)
    ours, theirs = Net(), Net()
    settings = config(optim=name, **FLAGS)
    optimizer = build_optimizer(ours, settings)
    away = StepGuard(optimizer, ours.named_parameters(), host=HostStates(optimizer, torch.device("cpu")))
    here = StepGuard(build_optimizer(theirs, settings), theirs.named_parameters())
    for i in range(4):
        for net, guard in ((ours, away), (theirs, here)):
            loss_of(net, i).backward()
            guard.step(1e-2)
    assert same(ours, theirs) and most[0] == 2 and not +live


# -- what cannot be ----------------------------------------------------------------------------------------------------
REFUSED = [
    ({"optimizer_in_backward": True}, "max_grad_norm 0, or --clip_two_pass true"),
    ({"clip_two_pass": True}, "needs --optimizer_in_backward"),
    ({"optimizer_in_backward": True, "clip_two_pass": True, "max_grad_norm": 0}, "clips nothing"),
    ({"optimizer_in_backward": True, "max_grad_norm": 0, "cpu_offload": True}, "on their way"),
    ({"optim_offload": True, "cpu_offload": True}, "already"),
    ({"bf16_update": "kahan"}, "--dtype float32"),
    ({"bf16_update": "kahan", "dtype": "bfloat16", "optim": "muon"}, "use adamw_torch"),
    ({"muon_learning_rate": 0.1}, "need --optim muon"),
    ({"muon_momentum": 0.5}, "need --optim muon"),
    ({"optim": "muon", "muon_learning_rate": 0.1, "learning_rate": 0.0}, "which is 0"),
    ({"optim": "adamw"}, "did you mean"),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_a_package_that_is_missing_is_named(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, package in (("adamw_torch_8bit", "torchao"), ("adamw_bnb_8bit", "bitsandbytes")):
        with pytest.raises(ConfigError, match=f"pip install {package}"):
            config(optim=name)


def test_what_the_model_rules_out_is_refused(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="needs CUDA and this is a cpu"):
        build_optimizer(Net(), config(optim="paged_adamw_8bit"))
    with pytest.raises(ConfigError, match="needs CUDA, got --use_cpu"):
        config(optim="adamw_bnb_8bit", use_cpu=True)
    with pytest.raises(ConfigError, match="bfloat16 weights"):
        build_optimizer(Net(), config(dtype="auto", bf16_update="kahan"))


def test_the_flag_is_read_from_the_command_line():
    from fastrl.cli import FOREIGN

    words = "--model_name_or_path m --dataset_name d --output_dir o --optim sgd --max_grad_norm 0".split()
    made = parse(SFTConfig, [*words, "--optimizer_in_backward", "true"], FOREIGN)
    assert (made.optim, made.optimizer_in_backward) == ("sgd", True)


def test_the_reader_is_told():
    assert notes_of(Net(), config()) == []
    assert "bf16_update" in notes_of(Net(torch.bfloat16), config(dtype="bfloat16"))[0]
    assert notes_of(Net(torch.bfloat16), config(dtype="bfloat16", bf16_update="kahan")) == []
    assert "changes nothing" in notes_of(Net(), config(optim_offload=True))[0]


# -- in a run ----------------------------------------------------------------------------------------------------------
RUNS = {
    "4bit": {"optim": "adamw_torch_4bit", "optimizer_in_backward": True, "clip_two_pass": True},
    "muon": {"optim": "muon", "muon_learning_rate": 2e-3},
    "adafactor": {"optim": "adafactor"},
    "stochastic": {"bf16_update": "stochastic", "dtype": "bfloat16"},
    "kahan": {"bf16_update": "kahan", "dtype": "bfloat16", "optimizer_in_backward": True, "max_grad_norm": 0},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("optim")
    model = tiny.make_model(root / "model", hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=1)
    return {"model": model, **tiny.make_data(root / "data")}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(name, place, tmp_path):
    shared = {"model_name_or_path": str(place["model"]), "dataset_name": str(place["sft"]), "learning_rate": 1e-3}
    shared |= {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, **RUNS[name]}
    whole = run(SFTConfig(output_dir=str(tmp_path / "whole"), **shared)).output_dir
    half = str(whole / "checkpoint-2")
    again = run(SFTConfig(output_dir=str(tmp_path / "again"), resume_from_checkpoint=half, **shared)).output_dir
    a, b, start = (load_file(x / "model.safetensors") for x in (whole, again, place["model"]))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k].float(), start[k].float()) for k in a)
