"""The torch contract: opcheck, torch.compile(fullgraph=True) equal to eager, autocast, strides, CUDA graphs."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from oracle import problem
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl import TokenBatch, fused_loss, linear_cross_entropy, linear_logprobs, losses, tokens
from fastrl.losses.policy import PPOClip
from fastrl.objective import outputs_of
from fastrl.ops import compiled, custom, fused, head
from fastrl.ops.custom import Call
from fastrl.ops.fused import How
from fastrl.ops.head import HeadSpec

N, H, V = 13, 16, 37
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COMPILERS = ["aot_eager", *(["inductor"] if shutil.which("g++") else [])]
NAMES = ("logprobs", "entropy", "logsumexp")


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def same(a, b) -> None:
    """The very same bits, dtypes and names."""
    a, b = (torch.utils._pytree.tree_leaves_with_path(x) for x in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    for (path, x), (_, y) in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and torch.equal(x, y), path
        else:
            assert x == y, path


def compile(f, backend="aot_eager", **options):
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def head_problem(seed=0, n=N, dtype=torch.float32, **options):
    """Problem with two ignored rows (full of NaN) where there is room for them."""
    p = problem(seed, n, H, V, dtype, **options)
    if n > 4:
        p.targets[[2, n - 1]] = -100
        p.hidden[2] = torch.nan
    return p


# -- opcheck -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["two_pass", "cached", "frozen", "forward"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_opcheck_statistics(backend, strategy, dtype, everything):
    """`everything`: bias, per-token temperatures, softcap, ignored rows, a cache for some of the rows."""
    options = dict(bias=True, temperature="per_token") if everything else {}
    dtype = DTYPES[dtype]
    p = head_problem(dtype=dtype, **options) if everything else problem(n=N, h=H, v=V, dtype=dtype)
    hidden, weight, bias = p.leaves()
    if strategy in ("frozen", "forward"):
        weight, bias = weight.detach(), None if bias is None else bias.detach()
    if strategy == "forward":
        hidden = hidden.detach()
    names = ("logprobs",) if strategy == "frozen" else (*NAMES, "log_sum_sq_probs", "is_argmax")
    temperatures = p.options["temperature"].float() if everything else None
    call = Call(",".join(names), backend, strategy, 4 * V * 8, 1.3, 5.0 if everything else None, 1.0)
    torch.library.opcheck(custom.linear_statistics, (hidden, weight, bias, p.targets, temperatures, *call.arguments()))


@pytest.mark.parametrize("strategy", ["two_pass", "cached", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_gradients(dtype, strategy):
    p = head_problem(dtype=DTYPES[dtype], bias=True)
    hidden, weight, bias = p.leaves()
    names = ("logprobs",) if strategy == "frozen" else NAMES
    call = Call(",".join(names), "torch", strategy, 4 * V * 8, 1.0, None, 1.7)
    with torch.no_grad():
        made = torch.ops.fastrl.linear_statistics(hidden, weight, bias, p.targets, None, *call.arguments())
    logprobs, entropy, _, _, _, *saved = made
    upstream = [p.upstream[n].float() if n in names else None for n in NAMES]
    needs = (True, strategy != "frozen", strategy != "frozen")
    inputs = (hidden, weight, bias, p.targets, None, logprobs, entropy, *saved, *upstream, *needs, *call.arguments())
    checks = ("test_schema", "test_faketensor")  # autograd refuses, which is another test
    torch.library.opcheck(custom.linear_gradients, inputs, test_utils=checks)


# -- linear_logprobs and linear_cross_entropy --------------------------------------------------------------------------
def statistics(p, leaves, upstream=True, run=linear_logprobs, names=NAMES, **how):
    """(statistics, gradients) under the problem's upstream gradients."""
    made = run(leaves[0], leaves[1], p.targets, leaves[2], outputs=names, **p.options, **how)
    total = sum((getattr(made, n) * p.upstream[n].to(getattr(made, n).dtype)).sum() for n in names)
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    return [getattr(made, n).detach() for n in names], torch.autograd.grad(total, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strategy", ["two_pass", "cached"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_statistics_equal_eager(compiler, strategy, dtype):
    """Other numbers of rows, ignored ones among them, run the graph made for the second: one for 13, one for any N."""
    compile_count = CompileCounterWithBackend(compiler)
    run = torch.compile(linear_logprobs, fullgraph=True, backend=compile_count)
    for n in (13, 17, 23, 64):
        p = head_problem(n, n, DTYPES[dtype], bias=True, temperature="per_token", softcap=4.0)
        how = dict(strategy=strategy, workspace_bytes=4 * V * 32)
        same(statistics(p, p.leaves(), run=run, **how), statistics(p, p.leaves(), **how))
    assert compile_count.frame_count <= 2


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_frozen_head(compiler):
    run = compile(linear_logprobs, compiler)
    for n in (13, 17):
        p = head_problem(n, n)
        leaves = [p.hidden.clone().requires_grad_(), p.weight, None]
        made = [statistics(p, leaves, names=("logprobs",), run=f) for f in (run, linear_logprobs)]
        same(*made)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_inference(compiler):
    p = head_problem(bias=True)
    run = compile(lambda *x: linear_logprobs(*x, outputs=(*NAMES, "is_argmax", "log_sum_sq_probs")), compiler)
    with torch.no_grad():
        args = p.hidden, p.weight, p.targets, p.bias
        same(vars(run(*args)), vars(linear_logprobs(*args, outputs=(*NAMES, "is_argmax", "log_sum_sq_probs"))))


@pytest.mark.parametrize("compiler", COMPILERS)
def test_compiled_cross_entropy(compiler):
    def f(hidden, weight, targets, bias):
        return linear_cross_entropy(hidden, weight, targets, bias, label_smoothing=0.1, z_loss=0.01)

    run, p = compile(f, compiler), head_problem(bias=True)
    made = []
    for g in (run, f):
        leaves = p.leaves()
        loss = g(leaves[0], leaves[1], p.targets, leaves[2])
        made.append((loss.detach(), torch.autograd.grad(1.7 * loss, leaves)))
    for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in made), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)  # what is around the op is fused: sums in another order


def test_bad_numbers_raise_inside_the_compiled_call():
    p = problem(n=N, h=H, v=V, dtype=torch.float32)
    run = compile(lambda t, temperature: linear_logprobs(p.hidden, p.weight, t, temperature=temperature).logprobs)
    run(p.targets, torch.ones(N))
    with pytest.raises(ValueError, match="targets has 1 value"):
        run(torch.where(torch.arange(N) == 4, V, p.targets), torch.ones(N))
    with pytest.raises(ValueError, match="temperature must be positive and finite, got -1.0 at row 3"):
        run(p.targets, torch.ones(N).index_fill(0, torch.tensor([3]), -1.0))


# -- fused_loss --------------------------------------------------------------------------------------------------------
def own_token(stats, batch):
    return (stats.logprobs - batch.old_logprobs).square() - 0.1 * stats.entropy


own_token.scope, own_token.outputs = "token", ("entropy",)


@dataclasses.dataclass(frozen=True)
class OwnSequence:
    """A method as its author writes it; numbers of its own and a metric."""

    power: float = 2.0
    scope = "sequence"

    def __call__(self, stats, batch):
        return tokens.segment_sum(stats.logprobs, batch).abs().pow(self.power)

    def metrics(self, stats, batch):
        return {"own/length": batch.lengths.float()}


OBJECTIVES = {
    "grpo": losses.get("grpo", kl_coef=0.01),
    "grpo_entropy": losses.get("grpo", entropy_coef=0.1),
    "dapo": losses.get("dapo"),
    "dpo": losses.get("dpo"),
    "nll": losses.get("nll"),
    "own_token": own_token,
    "own_sequence": OwnSequence(1.5),
}


def loss_problem(seed=0, extra=0, dtype=torch.float32, **counts):
    """(leaves, TokenBatch): ragged, one sequence empty, masked rows full of NaN, one ignored target."""
    g = torch.Generator().manual_seed(seed)
    lengths = (5, 0, 3, 1, 7, 4 + extra)
    t, randn = sum(lengths), lambda *s: torch.randn(*s, generator=g)
    leaves = [randn(t, H).to(dtype), randn(V, H).to(dtype), randn(V).to(dtype)]
    targets = torch.randint(0, V, (t,), generator=g)
    mask = torch.rand(t, generator=g) < 0.8
    leaves[0][~mask] = torch.nan
    targets[7] = -100
    cu = torch.tensor((0, *lengths)).cumsum(0)
    columns = {"advantages": randn(t), "old_logprobs": -3 + 0.3 * randn(t), "ref_logprobs": -3 + 0.3 * randn(t)}
    return [x.requires_grad_() for x in leaves], TokenBatch(targets, mask, cu, **columns, **counts)


def step(run, objective, leaves, batch, **how):
    """Everything that fused_loss gives, and the gradients of a scaled loss."""
    out = run(objective, leaves[0], leaves[1], batch, leaves[2], **how)
    wanted = [x for x in leaves if x.requires_grad]
    stats = {name: x for name, x in vars(out.stats).items() if x is not None}
    return out.loss.detach(), out.metrics, stats, torch.autograd.grad(1.7 * out.loss, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_compiled_fused_loss_equals_eager(name, dtype):
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(fused_loss, fullgraph=True, backend=counter)
    for extra in (0, 3, 8, 9):
        leaves, batch = loss_problem(extra, extra, DTYPES[dtype])
        same(step(run, OBJECTIVES[name], leaves, batch), step(fused_loss, OBJECTIVES[name], leaves, batch))
    assert counter.frame_count <= 2


@pytest.mark.skipif(len(COMPILERS) < 2, reason="no C++ compiler: inductor makes no code here")
@pytest.mark.parametrize("name", ["grpo", "dpo"])
def test_inductor_fused_loss_equals_eager(name):
    run = compile(fused_loss, "inductor")
    for extra in (0, 3):
        leaves, batch = loss_problem(extra, extra, num_tokens=31, num_sequences=torch.tensor(7.0))
        same(step(run, OBJECTIVES[name], leaves, batch), step(fused_loss, OBJECTIVES[name], leaves, batch))


OPTIONS = {
    "two_pass": dict(strategy="two_pass"),
    "cached": dict(strategy="cached", workspace_bytes=4 * V * 8),
    "aggregate": dict(aggregate="sequence_mean_token_sum"),
    "own_aggregate": dict(aggregate=lambda batch: 1.0 / (1 + batch.segment_ids)),
    "outputs": dict(outputs=("entropy", "is_argmax", "logsumexp", "log_sum_sq_probs")),
    "head": dict(temperature=0.7, logit_scale=1.3, softcap=5.0),
    "skip_inert": dict(skip_inert=True),
    "reference": dict(backend="reference"),
    "small": dict(workspace_bytes=4 * V * 5),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_compiled_options(option):
    leaves, batch = loss_problem()
    batch.advantages[::3] = 0.0
    made = [step(f, OBJECTIVES["dapo"], leaves, batch, **OPTIONS[option]) for f in (compile(fused_loss), fused_loss)]
    same(made[0][:3], made[1][:3])
    for a, b in zip(made[0][3], made[1][3], strict=True):  # the finished gradients are scaled, not their coefficients
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), ()])
def test_only_the_gradients_asked_for(trained):
    leaves, batch = loss_problem()
    leaves = [x.detach().requires_grad_(i in trained) for i, x in enumerate(leaves)]
    if trained:
        made = [step(f, OBJECTIVES["grpo"], leaves, batch) for f in (compile(fused_loss), fused_loss)]
    else:
        outs = [f(OBJECTIVES["grpo"], *leaves[:2], batch, leaves[2]) for f in (compile(fused_loss), fused_loss)]
        made = [(out.loss, out.metrics, vars(out.stats)) for out in outs]
        assert not outs[0].loss.requires_grad
    same(*made)


def test_objectives_and_numbers_are_told_apart():
    """The same code compiled for one objective and then another: neither may answer for the other."""
    run, (leaves, batch) = compile(fused_loss), loss_problem()
    more = [losses.get("grpo", kl_coef=k) for k in (0.02, 0.03, 0.01)]
    more += [losses.get("dr_grpo", max_length=n) for n in (4, 5, 6)]
    more += [OwnSequence(power) for power in (3.0, 2.5, 1.5)]
    with torch._dynamo.config.patch(recompile_limit=32):
        for objective in (*OBJECTIVES.values(), *more):
            same(step(run, objective, leaves, batch), step(fused_loss, objective, leaves, batch))


def test_numbers_of_the_head_may_change():
    run, (leaves, batch) = compile(fused_loss), loss_problem()
    logprobs = compile(linear_logprobs)
    for x in (0.7, 1.3, 2.5, 0.7):
        how = dict(temperature=x, logit_scale=x * 2, softcap=x * 3, workspace_bytes=int(1000 * x))
        made = [step(f, OBJECTIVES["grpo"], leaves, batch, **how) for f in (run, fused_loss)]
        same(*made)
        p = head_problem(**how)
        same(*(statistics(p, p.leaves(), run=f) for f in (logprobs, linear_logprobs)))
    for tokens_seen in (3, 17.0, 29, torch.tensor(31)):
        batch.num_tokens = tokens_seen
        same(*(step(f, OBJECTIVES["dapo"], leaves, batch) for f in (run, fused_loss)))


def test_equal_objectives_share_a_graph():
    counter = CompileCounterWithBackend("aot_eager")
    run, (leaves, batch) = torch.compile(fused_loss, fullgraph=True, backend=counter), loss_problem()
    for _ in range(3):
        step(run, losses.get("grpo", kl_coef=0.03), leaves, batch)
    assert counter.frame_count == 1


def test_objective_and_batch_made_inside_the_compiled_function():
    def f(hidden, weight, targets, advantages, bias):
        batch = TokenBatch(targets, advantages=advantages)
        return fused_loss(PPOClip(kl_coef=0.0, clip_high=0.3), hidden, weight, batch, bias)

    leaves, batch = loss_problem()
    leaves[0] = leaves[0].detach().nan_to_num().requires_grad_()
    args = leaves[0], leaves[1], batch.targets.clamp(min=0), batch.advantages, leaves[2]
    same(*(torch.autograd.grad(g(*args).loss, leaves) for g in (compile(f), f)))


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("name", ["grpo_entropy", "dpo"])
def test_opcheck_fused_loss(name, needs, monkeypatch):
    leaves, batch = loss_problem()
    leaves = [x.detach().requires_grad_(need) for x, need in zip(leaves, needs, strict=True)]
    seen = []
    op = compiled.fused_loss_op._opoverload
    monkeypatch.setattr(compiled, "_call", lambda *args: seen.append(args) or op(*args))
    how = How(outputs_of(OBJECTIVES[name]), None, None, None, None, -100, False)
    compiled.fused_loss(OBJECTIVES[name], leaves[0], HeadSpec(*leaves[1:]), batch, how)
    torch.library.opcheck(compiled.fused_loss_op, seen[0])


# -- autocast, strides, purity, second derivatives ---------------------------------------------------------------------
def test_compiled_autocast_equals_eager_autocast():
    p = head_problem(bias=True)
    leaves, batch = loss_problem()
    with torch.autocast("cpu", torch.bfloat16):
        same(statistics(p, p.leaves(), run=compile(linear_logprobs)), statistics(p, p.leaves()))
        made = [step(f, OBJECTIVES["grpo"], leaves, batch) for f in (compile(fused_loss), fused_loss)]
        same(*made)
    plain = step(fused_loss, OBJECTIVES["grpo"], leaves, batch)
    assert not torch.equal(plain[0], made[0][0]), "autocast changed nothing"

    def inside(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return fused_loss(*args)

    same(step(compile(inside), OBJECTIVES["grpo"], leaves, batch), made[1])


def views(p):
    """The problem's tensors in unusual memory: transposed, sliced, every other row, expanded."""
    wide = torch.full((2 * N, 2 * H + 1), torch.nan)
    wide[::2, 1 : H + 1] = p.hidden
    return {
        "transposed": (p.hidden.t().contiguous().t(), p.weight.t().contiguous().t(), p.targets),
        "sliced": (wide[::2, 1 : H + 1], p.weight.repeat(1, 2)[:, H:], p.targets.repeat_interleave(2)[::2]),
        "expanded": (p.hidden[:1].expand(N, H), p.weight[:1].expand(V, H), p.targets[:1].expand(N)),
    }


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("view", ["transposed", "sliced", "expanded"])
def test_compiled_takes_any_strides_and_changes_no_input(view, compiler):
    hidden, weight, targets = views(problem(n=N, h=H, v=V, dtype=torch.float32))[view]
    advantages = torch.linspace(-1, 1, N)

    def f(hidden, weight, targets, advantages):
        logprobs = linear_logprobs(hidden, weight, targets, outputs=("logprobs", "entropy"))
        loss = fused_loss(losses_grpo, hidden, weight, TokenBatch(targets, advantages=advantages)).loss
        return loss + (logprobs.logprobs * advantages).sum() + 0.3 * logprobs.entropy.square().sum()

    losses_grpo, made = OBJECTIVES["dapo"], []
    for run, dense in ((compile(f, compiler), False), (f, True)):
        inputs = [x.contiguous() if dense else x for x in (hidden, weight, targets)]
        before = [x.clone() for x in inputs]
        leaves = [x.detach().requires_grad_() for x in inputs[:2]]
        loss = run(*leaves, inputs[2], advantages)
        made.append((loss.detach(), torch.autograd.grad(loss, leaves)))
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in made), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", ["linear_logprobs", "fused_loss", "compiled"])
def test_second_derivatives_raise(op):
    leaves, batch = loss_problem()
    hidden = leaves[0].detach().nan_to_num().requires_grad_()
    targets = batch.targets.clamp(min=0)
    if op == "linear_logprobs":
        loss = linear_logprobs(hidden, leaves[1], targets).logprobs.square().sum()
    else:
        run = compile(fused_loss, "eager") if op == "compiled" else fused_loss
        loss = run(OBJECTIVES["nll"], hidden, leaves[1], TokenBatch(targets)).loss
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad.square().sum().backward()


def test_second_derivatives_raise_compiled():
    """Under AOT autograd torch itself refuses."""
    p = problem(n=N, h=H, v=V, dtype=torch.float32)
    hidden = p.hidden.requires_grad_()
    loss = compile(lambda h: linear_logprobs(h, p.weight, p.targets).logprobs.square().sum())(hidden)
    with torch._functorch.config.patch(donated_buffer=False), pytest.raises(RuntimeError, match="double backward"):
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        grad.square().sum().backward()


# -- CUDA graphs -------------------------------------------------------------------------------------------------------
class HostReads(TorchDispatchMode):
    """Lists what a CUDA graph cannot hold: numbers and sizes that depend on what tensors contain."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in ("nonzero", "_local_scalar_dense", "masked_select", "equal", "_unique2") or by_mask:
            self.found.append(name)
        if func.namespace == "fastrl":
            with self:
                return getattr(custom, name)._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def graph_step(hidden, weight, batch, backend=None):
    stats = linear_logprobs(hidden, weight, batch.targets, outputs=("logprobs", "entropy"), backend=backend)
    loss = fused_loss(OBJECTIVES["grpo"], hidden, weight, batch, backend=backend).loss
    total = loss + 0.1 * (stats.logprobs * batch.advantages).sum() + 0.2 * stats.entropy.square().mean()
    return total, *torch.autograd.grad(total, (hidden, weight))


def graph_inputs(device, dtype, n=48, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(s, 64, generator=g).to(device, dtype).requires_grad_() for s in (n, 160))
    columns = {name: torch.randn(n, generator=g).to(device) for name in ("advantages", "old_logprobs", "ref_logprobs")}
    cu = torch.tensor([0, n // 3, n], device=device)
    targets = torch.randint(0, 160, (n,), generator=g).to(device)
    return hidden, weight, TokenBatch(targets, cu_seqlens=cu, **columns, num_tokens=n, num_sequences=2)


def test_capture_reads_nothing_and_keeps_every_row(monkeypatch):
    """What a captured step runs, on the CPU in the interpreter: told that a graph is captured, it reads no number."""
    hidden, weight, batch = graph_inputs("cpu", torch.bfloat16)
    want = graph_step(hidden, weight, batch, "triton")
    for module in (custom, fused):  # numbers that are checked on the CPU only
        monkeypatch.setattr(module, "check_targets", lambda *args: None)
    monkeypatch.setattr(TokenBatch, "_check_boundaries", lambda self, t: None)
    with HostReads() as reads:
        graph_step(hidden, weight, batch, "triton")
    assert reads.found.count("nonzero") == 5  # ignored rows in each of three walks, zero coefficients in both backwards
    for module in (custom, head, tokens):
        monkeypatch.setattr(module, "capturing", lambda x: True)
    with HostReads() as reads:
        made = graph_step(hidden, weight, batch, "triton")
    assert reads.found == ["_local_scalar_dense"]  # the upstream of fused_loss, looked at on the CPU only
    same(made, want)


if torch.cuda.is_available():  # a CUDA graph needs a GPU: without one there is nothing to collect

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_cuda_graph_of_forward_and_backward(dtype):
        """Captured once, replayed on other numbers in the same memory."""
        hidden, weight, batch = graph_inputs("cuda", DTYPES[dtype])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                graph_step(hidden, weight, batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = graph_step(hidden, weight, batch)
        for seed in (0, 1):
            other, other_weight, other_batch = graph_inputs("cuda", DTYPES[dtype], seed=seed)
            with torch.no_grad():
                hidden.copy_(other), weight.copy_(other_weight)
            for name in ("targets", "advantages", "old_logprobs", "ref_logprobs"):
                getattr(batch, name).copy_(getattr(other_batch, name))
            graph.replay()
            for x, y in zip(made, graph_step(hidden, weight, batch), strict=True):
                torch.testing.assert_close(x, y)
