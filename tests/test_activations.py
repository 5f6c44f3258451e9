"""What a forward keeps and how its layers compute: every switch gives the plain path's numbers, and saves what it says.

The device that activations are offloaded to is played by `SlowCopies`, whose copies run as late as they may.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections import deque
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from ranks import run_ranks
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy

from fastrl.data.prefix import Layout
from fastrl.models import compiled, low_precision, pack_model, tiled_mlp
from fastrl.models.activations import AUTO, Switches, apply
from fastrl.models.checkpointing import KeepSome, checkpoint_layers
from fastrl.models.offload import Offloader

LENGTHS = (11, 23, 5, 23, 1, 14)
FOUR = ("llama", "qwen3", "gemma2", "gpt2")
NO_DROPOUT = {"gpt2": {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}}


def make(name: str, dtype: torch.dtype = torch.float64, **overrides):
    return pack_model(zoo.make(name, dtype, **{**NO_DROPOUT.get(name, {}), **overrides})).train()


def loss_of(model, lengths=LENGTHS, seed: int = 0) -> torch.Tensor:
    """A weighted sum of log-probs and entropies."""
    parts = zoo.documents(lengths, seed)
    stats = model.logprobs(torch.cat(parts), zoo.boundaries(parts), outputs=("logprobs", "entropy"))
    weights = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (weights * (stats.logprobs + 0.1 * stats.entropy)).sum()


def gradients(model, **options) -> dict[str, torch.Tensor]:
    """The loss and the gradient of every parameter, by name."""
    model.zero_grad()
    loss = loss_of(model, **options)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def error(got: dict, want: dict) -> float:
    """The worst entry's error over the largest entry of its tensor. Infinite where a gradient is missing."""
    if got.keys() != want.keys():
        return float("inf")
    errors = [(got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1e-30) for n in want]
    return float(torch.stack([e.nan_to_num(float("inf")) for e in errors]).max())


# -- a device of slow copies -------------------------------------------------------------------------------------------
class SlowCopies:
    """A Transfer whose copies run when somebody waits for them and no sooner. Until then what they fill is NaN.

    hazards: copies from or into memory that had been given back. log: what was begun, by the value that it carries.
    """

    device = torch.device("cpu")

    def __init__(self):
        self.queue, self.hazards, self.log, self.out = deque(), [], [], []

    def send(self, x):
        host = torch.full_like(x, torch.nan)
        self.out.append(weakref.ref(x))
        self.log.append(("send", float(x.flatten()[0])))
        return host, self._begin(host, x, "send")

    def fetch(self, host):
        x = torch.full_like(host, torch.nan)
        done = self._begin(x, host, "fetch")
        self.log.append(("fetch", done))
        return x, done

    def _begin(self, into, source, kind):
        job = {"into": weakref.ref(into), "from": weakref.ref(source), "kind": kind, "over": False}
        self.queue.append(job)
        return job

    def wait(self, done):
        while not done["over"]:
            job = self.queue.popleft()
            into, source = job["into"](), job["from"]()
            if job["kind"] == "fetch" and into is None or source is None and into is not None:
                self.hazards.append(job["kind"])
            elif into is not None:
                with torch.no_grad():
                    into.copy_(source)
            job["over"] = True

    finish = wait

    def on_device(self) -> int:
        return sum(ref() is not None for ref in self.out)


class NeverWaits(SlowCopies):
    def wait(self, done):
        pass


def offloaded(model, policy: str = "full", transfer=None) -> SlowCopies:
    transfer = SlowCopies() if transfer is None else transfer
    checkpoint_layers(model, policy, Offloader(transfer, smallest=100))
    return transfer


# -- the same numbers --------------------------------------------------------------------------------------------------
CASES = {
    "full": Switches(checkpointing=True),
    "selective": Switches(checkpointing=True, policy="selective"),
    "tiled": Switches(tiled_mlp=3),
    "tiled, full": Switches(tiled_mlp=5, checkpointing=True),
    "tiled, selective": Switches(tiled_mlp=4, checkpointing=True, policy="selective"),
}


@pytest.mark.parametrize("name", FOUR)
def test_each_switch_gives_the_plain_numbers(name):
    want = {dtype: gradients(make(name, dtype)) for dtype in (torch.float64, torch.float32)}
    for case, switches in CASES.items():
        for dtype, allowed in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            model = make(name, dtype)
            apply(model, switches)
            assert not model.notes
            assert error(gradients(model), want[dtype]) < allowed, (case, dtype)


@pytest.mark.parametrize("name", [n for n in zoo.ALL if n not in FOUR])
@pytest.mark.filterwarnings("ignore:.*one sequence at a time")
def test_every_architecture_of_the_zoo(name):
    want = gradients(make(name, torch.float32))
    for switches in (CASES["selective"], CASES["tiled, full"]):
        model = make(name, torch.float32)
        apply(model, switches)
        assert error(gradients(model), want) < 1e-5, switches


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_shared_prompt(name):
    """Completions that see one copy of their prompt, attended through its keys."""
    ids = torch.cat(zoo.documents((20, 9, 13, 1, 7)))
    layout = Layout((0, 20, 29, 42, 43, 50), (-1, 0, 0, 0, -1))
    targets = ids.roll(-1)

    def found(switches: Switches | None) -> dict:
        model = make(name)
        if switches is None:
            offloaded(model, "selective")
        else:
            apply(model, switches)
        model.zero_grad()
        logprobs = model(ids, layout, rows=torch.arange(50), targets=targets).logprobs
        (logprobs * torch.linspace(-1, 1, 50)).sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}

    want = found(Switches())
    for switches in (None, *CASES.values()):
        assert error(found(switches), want) < 1e-12, switches


def test_a_planted_mistake_is_seen(monkeypatch):
    """The comparison can fail: a tile left out of the sum, a wrong product kept."""
    want = gradients(make("llama"))
    model = make("llama")
    apply(model, CASES["tiled"])
    with monkeypatch.context() as patch:
        patch.setattr(tiled_mlp, "_added", lambda total, new: new)
        assert error(gradients(model), want) > 1e-3


def test_scoring_without_gradients_is_tiled_too(monkeypatch):
    model = make("llama")
    want = loss_of(model).detach()
    apply(model, CASES["tiled"])
    calls = []
    model.body.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model), want, rtol=1e-12, atol=0)
    assert len(calls) == 3


# -- checkpointing -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_dropout_is_drawn_again_as_it_was(policy):
    """Bitwise the masks of the run that keeps everything, through attention and residual dropout alike."""
    found = []
    for switches in (Switches(), Switches(checkpointing=True, policy=policy)):
        model = make("gpt2", resid_pdrop=0.2, attn_pdrop=0.3, embd_pdrop=0.1)
        apply(model, switches)
        torch.manual_seed(5)
        found.append(gradients(model))
    assert error(found[1], found[0]) < 1e-12
    torch.manual_seed(6)
    assert error(gradients(model), found[0]) > 1e-3


@pytest.mark.parametrize(("tiles", "products", "kept_products"), [(0, 7, 3), (2, 4, 2)])
def test_selective_keeps_attention_and_every_other_product(tiles, products, kept_products, monkeypatch):
    """Counted over one layer. Of an MLP in tiles nothing is kept, or its wide activations would live on."""
    kept, seen = [], []
    plain = KeepSome.__call__

    def watched(self, context, op, *args, **kwargs):
        policy, before = plain(self, context, op, *args, **kwargs), sum(self.seen.values())
        if not context.is_recompute:
            seen.append(before)
            kept.extend([op.name()] if policy == CheckpointPolicy.MUST_SAVE else [])
        return policy

    monkeypatch.setattr(KeepSome, "__call__", watched)
    model = make("llama", num_hidden_layers=1)
    apply(model, Switches(checkpointing=True, policy="selective", tiled_mlp=tiles))
    gradients(model, lengths=(9, 9))
    assert max(seen) == products
    assert sum(n == "aten::mm" for n in kept) == kept_products
    assert sum("attention" in n for n in kept) == 1 and len(kept) == kept_products + 1


def test_attention_with_dropout_is_never_kept():
    op = torch.ops.aten._scaled_dot_product_efficient_attention.default
    qkv = [torch.zeros(1, 1, 4, 8)] * 3
    context = type("Context", (), {"is_recompute": False})()
    assert KeepSome()(context, op, *qkv, None, True) == CheckpointPolicy.MUST_SAVE
    assert KeepSome()(context, op, *qkv, None, True, 0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    assert KeepSome()(context, op, *qkv, None, True, dropout_p=0.1) == CheckpointPolicy.PREFER_RECOMPUTE


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="full or selective"):
        apply(make("llama"), Switches(checkpointing=True, policy="some"))


# -- offload -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_offloaded_inputs_come_back_in_time(name, policy):
    """With copies as slow as they may be, over several micro-batches whose graphs are alive together."""
    layers = {"n_layer": 5} if name == "gpt2" else {"num_hidden_layers": 5}
    plain, model = make(name, **layers), make(name, **layers)
    apply(model, Switches(tiled_mlp=2))
    transfer = offloaded(model, policy)
    losses = [loss_of(m, seed=seed) for m in (plain, model) for seed in (0, 1)]
    for i in (1, 0, 3, 2):
        losses[i].backward()
    plain_grads, grads = ({n: p.grad for n, p in m.named_parameters()} for m in (plain, model))
    assert error(grads, plain_grads) < 1e-12
    assert [kind for kind, _ in transfer.log].count("send") == 10
    assert not transfer.hazards


def test_the_order_of_copies():
    transfer = SlowCopies()
    offloader = Offloader(transfer, in_flight=2, smallest=1)
    kept = []
    for i in range(6):
        kept.append(offloader.pack(torch.full((4, 3), float(i), dtype=torch.float64)))
        assert transfer.on_device() <= 3  # the one in use and two on their way
    fetches = []
    for i in reversed(range(6)):
        x = offloader.unpack(kept.pop())
        assert (x == i).all()
        fetches.append(sum(kind == "fetch" for kind, _ in transfer.log))
    # 5 and 4 had not left; using 4 sets 3 out, using 3 sets 2 out, ...: one ahead, and never more.
    assert fetches == [0, 1, 2, 3, 4, 4]
    assert not transfer.hazards and not any(ref() is not None for ref in transfer.out)


def test_small_and_foreign_tensors_stay():
    offloader = Offloader(SlowCopies(), smallest=100)
    small, view = torch.zeros(3), torch.zeros(50, 4).t()
    weight = nn.Parameter(torch.zeros(99))
    assert all(offloader.pack(x) is x for x in (small, view, weight))


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_error_in_between_leaves_nothing_behind(when):
    plain, model = (make("llama", num_hidden_layers=5) for _ in range(2))
    want = gradients(plain)
    transfer = offloaded(model)
    fail = {"now": True}

    def broken(*_):
        if fail["now"]:
            raise RuntimeError("out of memory")

    place = model.body.layers[3].mlp
    hook = place.register_forward_hook(broken) if when == "forward" else None
    if when == "backward":
        model.body.layers[2].mlp.down_proj.weight.register_hook(broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        gradients(model)
    assert transfer.on_device() == 0  # all went with the graph
    fail["now"] = False
    if hook is not None:
        hook.remove()
    assert error(gradients(model), want) < 1e-12
    assert not transfer.hazards


def test_a_missing_wait_is_seen():
    """The tests above can fail: a device that is not waited for gives NaN, one that frees too soon a hazard."""
    model = make("llama", num_hidden_layers=5)
    offloaded(model, transfer=NeverWaits())
    assert error(gradients(model), gradients(make("llama", num_hidden_layers=5))) == float("inf")
    transfer = SlowCopies()
    ticket = Offloader(transfer, smallest=1).pack(torch.ones(4))
    ticket.leaving = None  # given back without a wait
    ticket.fetch()
    transfer.wait(ticket.coming[1])
    assert transfer.hazards == ["send"]


def test_a_change_in_place_is_refused():
    offloader = Offloader(SlowCopies(), smallest=1)
    x = torch.ones(4)
    kept = offloader.pack(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        offloader.unpack(kept)


def test_on_the_cpu_offloading_is_a_note():
    model = make("llama")
    apply(model, Switches(checkpointing=True, offload=True))
    assert any("--activation_offloading does nothing here" in note for note in model.notes)
    assert error(gradients(model), gradients(make("llama"))) < 1e-12


# -- tiled MLP ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "times"), [("llama", 2), ("qwen3", 2), ("gemma2", 3)])
def test_a_checkpoint_around_runs_no_tile_again(name, times):
    """Forward and backward once each. Gemma 2 has a norm behind the MLP, whose input has to be made again."""
    model = make(name)
    apply(model, CASES["tiled, full"])
    calls = []
    model.body.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    gradients(model)
    assert len(calls) == times * 5


def test_hooks_on_gradients_run_once():
    model, calls = make("llama"), []
    apply(model, CASES["tiled, full"])
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    gradients(model)
    assert sorted(calls) == sorted(n for n, _ in model.named_parameters())


def test_gradients_add_up_over_micro_batches_and_a_graph_can_be_kept():
    plain, model = make("llama"), make("llama")
    apply(model, CASES["tiled"])
    for m in (plain, model):
        loss = loss_of(m)
        loss.backward(retain_graph=True)
        loss.backward()
        loss_of(m, seed=1).backward()
    found = [{n: p.grad for n, p in m.named_parameters()} for m in (model, plain)]
    assert error(*found) < 1e-12
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_tiles_draw_their_dropout_again(checkpointing):
    """With dropout inside the MLP the gradient is that of the function that the seed fixes (central differences)."""
    model = make("gpt2", resid_pdrop=0.3)
    apply(model, Switches(tiled_mlp=3, checkpointing=checkpointing))
    parameters = list(model.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=by)
        torch.manual_seed(4)
        return loss_of(model)

    step = 1e-6
    moved(0.0).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True))
    above = moved(step).item()
    below = moved(-2 * step).item()
    torch.testing.assert_close(slope.item(), (above - below) / (2 * step), rtol=1e-5, atol=0)


@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast(inside):
    """As close to float32 as the plain path is, and no gradient lost where backward runs inside autocast too."""

    seen = []

    def found(tiles: int, cast: bool) -> dict:
        model = make("llama", torch.float32)
        apply(model, Switches(tiled_mlp=tiles))
        for layer in model.body.layers:
            layer.mlp.act_fn.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = loss_of(model)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    exact, plain, tiled = found(0, False), found(0, True), found(3, True)
    assert seen == 2 * [torch.float32] + (2 + 12) * [torch.bfloat16]  # recomputed as it was computed
    assert all(g is not None for g in tiled.values())
    assert 1e-4 < error(plain, exact) < 0.2  # bfloat16 it is
    assert error(tiled, exact) < 1.5 * error(plain, exact)


def test_bfloat16_weights_sum_their_tiles_in_float32(monkeypatch):
    """77 tiles of one token are as exact as the whole at once; summed in bfloat16 they are not."""
    exact = gradients(make("llama", torch.bfloat16).float())

    def off(tiles: int) -> float:
        model = make("llama", torch.bfloat16)
        apply(model, Switches(tiled_mlp=tiles))
        found = gradients(model)
        names = [n for n in exact if "mlp" in n]
        return sum(float((found[n].float() - exact[n]).norm() / exact[n].norm()) for n in names)

    assert off(77) < 1.05 * off(0)
    monkeypatch.setattr(tiled_mlp, "_added", lambda total, new: new if total is None else total + new)
    assert off(77) > 1.1 * off(0)


def test_adapters_and_frozen_parts():
    from peft import LoraConfig, inject_adapter_in_model

    found = []
    for switches in (Switches(), CASES["tiled, full"], CASES["tiled, selective"]):
        plain = zoo.make("llama", torch.float64)
        torch.manual_seed(1)
        plain = inject_adapter_in_model(LoraConfig(r=4, target_modules=["gate_proj", "down_proj", "q_proj"]), plain)
        generator = torch.Generator().manual_seed(2)
        for name, p in plain.named_parameters():
            if "lora_" in name:
                p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1
        model = pack_model(plain).train()
        apply(model, switches)
        found.append(gradients(model))
        assert all("lora_" in name for name in found[-1] if name != "loss") and len(found[-1]) == 13
    assert error(found[1], found[0]) < 1e-12 and error(found[2], found[0]) < 1e-12


def test_experts_and_modules_that_mix_tokens_are_left_alone():
    model = make("gpt_oss", torch.float32)
    apply(model, Switches(tiled_mlp=4))
    assert any("leaves mlp alone: GptOssMLP is a mixture of experts" in note for note in model.notes)
    assert not any(isinstance(m, tiled_mlp.TiledMLP) for m in model.modules())

    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x.cumsum(dim=1))

    class Two(nn.Linear):
        def forward(self, x, residual):
            return super().forward(x) + residual

    assert tiled_mlp.why_not(nn.Linear(8, 8), 8) is None
    assert "each token by itself" in tiled_mlp.why_not(Mixing(8, 8), 8)
    assert "hidden states alone" in tiled_mlp.why_not(Two(8, 8), 8)


def test_auto_tiles_have_a_fixed_size(monkeypatch):
    monkeypatch.setattr(tiled_mlp, "AUTO_TOKENS", 20)
    model = make("llama")
    want = gradients(make("llama"))
    apply(model, Switches(tiled_mlp=AUTO))
    calls = []
    model.body.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    assert error(gradients(model), want) < 1e-12 and len(calls) == 2 * 4  # 77 tokens
    calls.clear()
    gradients(model, lengths=(7,))
    assert len(calls) == 1


def test_names_and_saved_weights_stay(tmp_path):
    model = make("llama")
    before = list(model.state_dict())
    apply(model, CASES["tiled"])
    assert list(model.state_dict()) == before
    model.model.save_pretrained(tmp_path)
    again = type(model.model).from_pretrained(tmp_path, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.model.parameters(), strict=True))


# -- memory ------------------------------------------------------------------------------------------------------------
PEAKS = """
import json, sys, torch, transformers
from fastrl.bench.machine import extra_peak_mib
from fastrl.models import pack_model
from fastrl.models.activations import Switches, apply
sizes = dict(vocab_size=64, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2)
config = transformers.LlamaConfig(**sizes, intermediate_size=2048, max_position_embeddings=4096)
ids, cu = torch.randint(0, 64, (1024,)), torch.tensor([0, 512, 1024])
found = {}
for name, switches in json.loads(sys.argv[1]).items():
    model = pack_model(transformers.LlamaForCausalLM(config)).train()
    apply(model, Switches(**switches))
    step = lambda ids=ids, cu=cu: model.logprobs(ids, cu).logprobs.sum().backward()
    step(ids[:64], torch.tensor([0, 64]))
    model.zero_grad()
    found[name] = extra_peak_mib(step)[0]
print(json.dumps(found))
"""


def test_peak_memory_drops():
    """MiB over the loaded model; one [T, F] tensor of the MLP is 8 MiB, and a layer makes 4 to 6 of them."""
    full = {"checkpointing": True}
    asked = {
        "plain": {},
        "selective": full | {"policy": "selective"},
        "full": full,
        "tiled": {"tiled_mlp": 16},
        "both": full | {"tiled_mlp": 16},
    }
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PEAKS, json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = json.loads(done.stdout.splitlines()[-1])
    assert peak["plain"] > 4 * 3 * 8
    assert peak["full"] < 0.5 * peak["plain"]
    assert peak["full"] < peak["selective"] < 0.8 * peak["plain"]
    assert peak["tiled"] < 0.4 * peak["plain"]
    assert peak["both"] < 0.5 * peak["full"] and peak["both"] < peak["tiled"], peak


# -- several processes -------------------------------------------------------------------------------------------------
def sharded_work() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from fastrl.train.parallel import MESH, ShardOptions, World, full, shard

    mesh = init_device_mesh("cpu", (1, 2, 1), mesh_dim_names=MESH)
    world = World(dist.get_rank(), 2, dist.get_rank(), torch.device("cpu"), mesh)
    kinds = ("selective", "tiled, full", "tiled, selective")
    for switches in (*(CASES[k] for k in kinds), Switches(checkpointing=True, float32=("*norm",))):
        want = gradients(make("qwen3", torch.float32))
        model = make("qwen3", torch.float32)
        apply(model, switches)
        shard(model, world, ShardOptions())
        got = {n: full(g) if n != "loss" else g for n, g in gradients(model).items()}
        want = {n: g if n == "loss" else 2 * g for n, g in want.items()}  # both ranks hold the same micro-batch
        assert error(got, want) < 2e-6, switches
    model = make("qwen3", torch.float32)
    apply(model, Switches(checkpointing=True, float32=("*norm",)))
    shard(model, world, ShardOptions(compute=torch.bfloat16))
    used = {}
    for name, module in model.named_modules():
        if name.endswith(("input_layernorm", "gate_proj")):
            module.register_forward_hook(lambda m, args, out, name=name: used.update({name: m.weight.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(model).backward()
    assert {d for n, d in used.items() if n.endswith("norm")} == {torch.float32}
    assert {d for n, d in used.items() if n.endswith("proj")} == {torch.bfloat16}


def test_sharded():
    run_ranks(2, sharded_work)


# -- compiled ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def compiled_model(name: str, backend: str, checkpointing: bool, monkeypatch, tiles: int = 0):
    model = make(name, torch.float32)
    monkeypatch.setattr(compiled, "BACKEND", backend)
    apply(model, Switches(compile=True, checkpointing=checkpointing, tiled_mlp=tiles))
    return model


def test_compiled_layers_follow_every_pack(fresh_compiler, monkeypatch):
    """Numbers of the plain path, and no new code for another pack. The tracing alone: nothing is generated."""
    plain, model = make("gemma2", torch.float32), compiled_model("gemma2", "aot_eager", True, monkeypatch, tiles=3)
    packs = [LENGTHS, (30,), (9, 9, 9), (3, 50, 2), (17, 4, 1, 1, 29, 8)]
    graphs = []
    for lengths in packs:
        assert error(gradients(model, lengths=lengths), gradients(plain, lengths=lengths)) < 1e-5
        graphs.append(fresh_compiler["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] - graphs[0] <= 2, graphs


def test_generated_code_gives_the_plain_numbers(fresh_compiler, monkeypatch):
    plain, model = make("llama", torch.float32), compiled_model("llama", "inductor", False, monkeypatch)
    for lengths in (LENGTHS, (9, 30)):
        assert error(gradients(model, lengths=lengths), gradients(plain, lengths=lengths)) < 1e-5
    assert fresh_compiler["stats"]["unique_graphs"] > 0


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"--torch_compile needs a C\+\+ compiler \(no-such-compiler\)"):
        apply(make("llama"), Switches(compile=True))


# -- precision ---------------------------------------------------------------------------------------------------------
def test_modules_in_float32_under_autocast():
    model = make("llama", torch.float32)
    apply(model, Switches(float32=("layers.0.mlp", "*layernorm")))
    seen = {}
    for name, module in model.named_modules():
        if name.endswith(("gate_proj", "input_layernorm")):
            module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: out.dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert seen["model.model.layers.0.mlp.gate_proj"] == torch.float32
    assert seen["model.model.layers.1.mlp.gate_proj"] == torch.bfloat16


def test_a_float32_norm_leaves_the_residual_stream_and_a_router_does_not():
    norm, router = (nn.Sequential(m) for m in (nn.LayerNorm(8), nn.Linear(8, 3)))
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    for module in (norm[0], router[0]):
        module.__class__ = low_precision._in_float32(type(module))
    assert norm(x).dtype == torch.bfloat16 and router(x).dtype == torch.float32
    torch.testing.assert_close(router(x), nn.functional.linear(x.float(), router[0].weight, router[0].bias))


@pytest.mark.parametrize(
    ("pattern", "dtype", "why"),
    [
        ("*nrom", torch.float32, "matches no module"),
        ("lm_head", torch.float32, "not layers, embedding or head"),
        ("layers.1", torch.float32, "not layers"),
        ("*norm", torch.bfloat16, "needs float32 weights"),
    ],
)
def test_what_cannot_be_in_float32(pattern, dtype, why):
    with pytest.raises(ValueError, match=why):
        apply(make("llama", dtype), Switches(float32=(pattern,)))


def test_patterns_match_ends_of_names():
    model = make("llama").model
    layers = model.model.layers
    assert low_precision.matching(model, "mlp") == [layers[0].mlp, layers[1].mlp]
    assert low_precision.matching(model, "norm") == [model.model.norm]
    assert low_precision.matching(model, "0.mlp.*") == list(layers[0].mlp.children())
    assert low_precision.matching(model, "gate") == []


def test_float8_is_refused_where_it_does_not_run():
    with pytest.raises(ValueError, match="compute capability 8.9 or higher, this is cpu"):
        apply(make("llama"), Switches(fp8="rowwise"))


def test_float8_emulated():
    exact = gradients(make("llama", torch.float32))
    model = make("llama", torch.float32)
    notes = low_precision.convert_to_float8(model.model, model.head, "tensorwise", torch.device("cpu"), emulate=True)
    assert notes == ["14 linear layers multiply in float8 (tensorwise); this changes results"]
    assert type(model.head).__name__ == "LMHead"
    assert 1e-3 < error(gradients(model), exact) < 0.5


# -- flags -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ({"tiled_mlp": "many"}, "--tiled_mlp must be auto or a number"),
        ({"tiled_mlp": -1}, "--tiled_mlp must be auto or a number"),
        ({"gradient_checkpointing_policy": "some"}, "must be one of full, selective"),
        ({"gradient_checkpointing": False, "activation_offloading": True}, "needs --gradient_checkpointing true"),
        ({"torch_compile": True, "gradient_checkpointing_policy": "selective"}, "use full with it"),
        ({"fp8": "int8"}, "must be one of tensorwise"),
        ({"fp8": "rowwise", "use_peft": True}, "--use_peft true freezes"),
        ({"fp32_modules": ["*norm"], "dtype": "bfloat16"}, "--fp32_modules needs --dtype float32"),
        ({"fp32_modules": ["*norm"], "bf16": False}, "has nothing to do"),
    ],
)
def test_flags_that_are_refused(flags, why):
    from fastrl.train.config import CONFIGS
    from fastrl.train.flags import ConfigError

    with pytest.raises(ConfigError, match=why):
        CONFIGS["sft"](model_name_or_path="m", dataset_name="d", output_dir="o", **flags)


def test_the_trainer_turns_them_on(tmp_path, monkeypatch):
    from fastrl.models import activations
    from fastrl.train import run
    from fastrl.train.config import CONFIGS

    asked, turn_on = [], activations.apply
    monkeypatch.setattr(activations, "apply", lambda m, s, device: asked.append(s) or turn_on(m, s, device))
    model, data = tiny.make_model(tmp_path / "model"), tiny.make_data(tmp_path / "data")["sft"]
    shared = {"model_name_or_path": str(model), "dataset_name": str(data), "max_steps": 2, "save_strategy": "no"}
    runs = {
        "plain": {"gradient_checkpointing": False},
        "switched": {"gradient_checkpointing_policy": "selective", "tiled_mlp": 3, "activation_offloading": True},
    }
    histories = {}
    for name, flags in runs.items():
        out = str(tmp_path / name)
        histories[name] = run(CONFIGS["sft"](**shared, **flags, output_dir=out, logging_steps=1)).history
    plain, switched = ([(r["loss"], r["grad_norm"]) for r in h if "loss" in r] for h in histories.values())
    assert len(plain) == 2
    torch.testing.assert_close(torch.tensor(switched), torch.tensor(plain), rtol=1e-5, atol=0)
    assert asked == [Switches(), Switches(checkpointing=True, policy="selective", offload=True, tiled_mlp=3)]
