"""Completions that share one copy of their prompt say and learn what each says and learns with a copy of its own."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.distributed as dist
import zoo
from ranks import run_ranks

from fastrl import losses
from fastrl.data.packing import collate, pack
from fastrl.data.prefix import Layout, Run, lay_out, measured, runs, tokens_of
from fastrl.data.types import Sample
from fastrl.models import attention, exact, load_causal_lm, load_reward_model, pack_model, tree_attention
from fastrl.models.exact import Scores, attend_masked, attend_packed
from fastrl.models.packing import Packing
from fastrl.models.tree_attention import TreeAttention, attend_tree, kernels_for
from fastrl.train import DPOConfig, GRPOConfig, run
from fastrl.train.config import PPOConfig, RewardConfig, RLOOConfig
from fastrl.train.parallel import ShardOptions, World, full, mesh_of, shard
from fastrl.train.stages import base
from fastrl.train.step import Forward, loss_of, plan, prepare

CPU = torch.device("cpu")


# -- samples -----------------------------------------------------------------------------------------------------------
def groups(seed: int, count: int = 4, most: int = 5, words: int = zoo.VOCABULARY) -> list[Sample]:
    """Groups of ragged completions to ragged prompts, lone ones and an untrained one among them."""
    draw = random.Random(seed)

    def text(n: int) -> list[int]:
        return [draw.randrange(3, words) for _ in range(n)]

    made = []
    for group in range(count):
        prompt = text(draw.randint(1, 12))
        for k in range(1 if group == 1 else draw.randint(2, most)):
            answer = text(draw.randint(1, 9))
            sample = Sample.from_parts(prompt, answer, group_id=group, advantage=draw.gauss(0, 1))
            if (group, k) == (2, 1):
                sample = dataclasses.replace(sample, completion_mask=[False] * len(sample))
            made.append(sample)
    for sample in made:
        for name in ("old_logprobs", "ref_logprobs"):
            sample.fields[name] = [draw.gauss(-4.5, 0.3) for _ in range(sample.num_trained)]
    return made


def pairs(seed: int, count: int = 5, prompt_trained: bool = False) -> list[Sample]:
    """Chosen and rejected, whose answers begin alike now and then; prompt_trained: everything after token 0 is."""
    draw, made = random.Random(seed), []
    for row in range(count):
        prompt = [draw.randrange(3, zoo.VOCABULARY) for _ in range(draw.randint(1, 12))]
        for side in range(2):
            answer = [7] * (row % 2) + [draw.randrange(3, zoo.VOCABULARY) for _ in range(draw.randint(1, 8))]
            sample = Sample.from_parts(prompt, answer, row=row)
            if prompt_trained:
                sample = Sample(sample.input_ids, 1, [t > 0 for t in range(len(sample))], sample.fields)
            sample.fields["ref_logprobs"] = [draw.gauss(-4.5, 0.3) for _ in range(sample.num_trained)]
            sample.fields["reward"] = float(1 - side)
            made.append(sample)
    return made


# -- who shares, what it costs, where it goes --------------------------------------------------------------------------
def test_who_shares():
    a, b = ([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 6])

    def made(*parts, key="group_id", keys=(0, 0, 0)):
        return runs([Sample.from_parts(p, c, **{key: k}) for (p, c), k in zip(parts, keys, strict=False)])

    assert made(a, b, a) == [Run(0, 3, 3)]  # completions begin alike, but their tokens are trained
    assert made(a, b, key="row") == [Run(0, 2, 3)]
    assert made(a, b, keys=(0, 1)) == [Run(0, 1, 0), Run(1, 1, 0)]
    assert made(a, b, key="other") == [Run(0, 1, 0), Run(1, 1, 0)]
    assert made(a, ([9, 2, 3], [4])) == [Run(0, 1, 0), Run(1, 1, 0)]
    assert made(a, b, ([1, 8, 8], [4])) == [Run(0, 2, 3), Run(2, 1, 0)]  # 3 x 1 tokens would save less than 2 x 3
    assert made(([1], [2]), ([1], [3])) == [Run(0, 2, 1)]
    untrained = [
        Sample([1, 2, 3, 4], 2, [False] * 4, {"row": 0}),
        Sample([1, 2, 3, 5], 2, [False] * 3 + [True], {"row": 0}),
    ]
    assert runs(untrained) == [Run(0, 2, 3)]  # beyond the prompt, as long as nothing is trained


@pytest.mark.parametrize("seed", range(8))
def test_every_token_is_found_where_it_went(seed):
    samples = groups(seed)
    layout, place = lay_out(samples)
    out, plain = collate(samples, share=True), collate(samples)
    assert out["layout"] == layout and torch.equal(plain["layout"], plain["cu_seqlens"])
    assert out["input_ids"].shape[0] == layout.bounds[-1] == tokens_of(samples, range(len(samples)), True)
    for name in ("input_ids", "position_ids"):
        assert torch.equal(out[name][place], plain[name])
    for name in ("rows", "here", "ends"):
        assert torch.equal(out[name], place[plain[name]])
    assert torch.equal(out["input_ids"][out["here"]], out["targets"])
    assert torch.equal(out["row_cu_seqlens"], plain["row_cu_seqlens"])
    packing = Packing.from_bounds(layout.bounds, CPU, layout.parents)
    assert torch.equal(packing.position_ids, out["position_ids"])
    assert packing.longest == max(map(len, samples))
    bounds, index, back = layout.expanded()
    assert torch.equal(out["input_ids"][index], plain["input_ids"]) and bounds == plain["cu_seqlens"].tolist()
    assert torch.equal(plain["input_ids"][back], out["input_ids"])


@pytest.mark.parametrize("ranks", [1, 9])
@pytest.mark.parametrize("budget", [1, 20, 33, 64, 1000])
def test_a_budget_counts_a_shared_prompt_once(budget, ranks):
    samples = groups(3, count=6)
    lengths, units = measured(samples, budget, ranks=ranks)
    assert sum(units) == len(samples) and len(units) >= min(ranks, len(samples))
    start = 0
    for size in units:
        part = range(start, start + size)
        assert sum(lengths[i] for i in part) == tokens_of(samples, part, True)
        assert size == 1 or tokens_of(samples, part, True) <= budget
        start += size
    for part in pack(lengths, budget, units):
        assert len(part) == 1 or tokens_of(samples, part, True) <= budget
    if budget == 1000 and ranks == 1:
        assert list(units) == [run.count for run in runs(samples)]
    assert measured(samples, budget, share=False) == ([len(s) for s in samples], 1)


def test_pairs_stay_pairs():
    samples = pairs(0)
    lengths, units = measured(samples, 20, unit=2)
    assert units == 2 and [sum(lengths[i : i + 2]) for i in range(0, len(samples), 2)] == [
        tokens_of(samples, (i, i + 1), True) for i in range(0, len(samples), 2)
    ]
    assert sum(lengths) < sum(map(len, samples))


def test_a_layout_is_checked():
    for parents in [(0, -1, 0), (-1, -1, 0), (-1, 0, 1), (-1, 0)]:
        with pytest.raises(ValueError, match="segment|segments"):
            Layout((0, 2, 4, 6), parents)
    assert Packing.from_bounds((0, 2, 2, 5, 5), CPU, (-1, 0, 0, 0)).parents == (-1, 0)
    assert Packing.from_bounds((0, 2, 2, 2), CPU, (-1, 0, 0)).parents is None
    assert Packing.from_bounds((0, 0, 2, 4), CPU, (-1, 0, 0)).parents is None


# -- attention ---------------------------------------------------------------------------------------------------------
HEADS, D = 4, 8
# A group, a lone sequence, a prompt of one token with an empty completion, a group longer than a window or a block.
TREE = Layout((0, 5, 8, 12, 19, 20, 20, 23, 44, 50, 61), (-1, 0, 0, -1, -1, 4, 4, -1, 7, 7))


def draw(kv_heads: int, dtype=torch.float64, size: int = D) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(HEADS, D), (kv_heads, D), (kv_heads, size)]
    made = [torch.randn(1, 61, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [x.transpose(1, 2).requires_grad_() for x in made]


def unshared(q, k, v, scores: Scores, chunk: int | None = None) -> torch.Tensor:
    """Each completion after a prompt of its own, through the attention of packs."""
    bounds, index, back = TREE.expanded()
    packing = Packing.from_bounds(tuple(bounds), CPU)
    packing = packing if chunk is None else packing.chunked(chunk)
    return attend_packed(*(x[:, :, index] for x in (q, k, v)), packing, scores)[:, back]


def assert_agree(made, want, leaves, tolerance: float) -> None:
    torch.testing.assert_close(made, want, atol=tolerance, rtol=tolerance)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype)
    # A prompt's output stands once in what is shared and once in each copy; its gradient goes to the first of these.
    got, expected = (torch.autograd.grad(x, leaves, upstream) for x in (made, want))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=10 * tolerance, rtol=10 * tolerance)


@pytest.fixture
def tree() -> Packing:
    return Packing.from_bounds(TREE.bounds, CPU, TREE.parents)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_kernels_of_blocks_make_the_whole_softmax(tree, kv_heads, scaling):
    q, k, v = draw(kv_heads)
    scores = Scores(scaling, window=100)
    assert kernels_for(q, v, tree, scores) is tree_attention.OnCPU
    assert_agree(attend_tree(q, k, v, tree, scores), unshared(q, k, v, scores), [q, k, v], 1e-12)


class StandIn:
    """What torch's flash kernels over boundaries compute on CUDA, by definition: shapes and order of arguments too."""

    @staticmethod
    def blocks(q, k, cu_q, cu_k, most_q, most_k, causal, scale):
        assert q.is_contiguous() and k.is_contiguous() and cu_q.dtype == cu_k.dtype == torch.int32
        assert int(cu_q.diff().max()) <= most_q and int(cu_k.diff().max()) <= most_k and most_q > 1
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        for a, b, c, d in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False):
            z = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
            seen = torch.ones(z.shape[1:], dtype=torch.bool)
            yield slice(a, b), slice(c, d), z.masked_fill(~(seen.tril() if causal else seen), -torch.inf)

    @classmethod
    def _flash_attention_forward(cls, q, k, v, cu_q, cu_k, most_q, most_k, dropout, causal, debug, *, scale):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])
        v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        for rows, keys, z in cls.blocks(q, k, cu_q, cu_k, most_q, most_k, causal, scale):
            lse[:, rows] = z.logsumexp(-1)
            out[rows] = torch.einsum("hqk,khd->qhd", z.softmax(-1), v[keys])
        return out, lse, None, None, None

    @classmethod
    def _flash_attention_backward(
        cls, d_out, q, k, v, out, lse, cu_q, cu_k, most_q, most_k, dropout, causal, seed, unused, *, scale
    ):
        copies = q.shape[1] // k.shape[1]
        wide, values = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(wide), torch.zeros_like(values)
        for rows, keys, z in cls.blocks(q, k, cu_q, cu_k, most_q, most_k, causal, scale):
            p = (z - lse[:, rows, None]).exp()
            d_p = torch.einsum("qhd,khd->hqk", d_out[rows], values[keys])
            d_z = p * (d_p - (d_out[rows] * out[rows]).sum(-1).T[..., None]) * scale
            d_v[keys] += torch.einsum("hqk,qhd->khd", p, d_out[rows])
            d_q[rows] += torch.einsum("hqk,khd->qhd", d_z, wide[keys])
            d_k[keys] += torch.einsum("hqk,qhd->khd", d_z, q[rows])
        return d_q, *(x.unflatten(1, (-1, copies)).sum(2) for x in (d_k, d_v))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_what_cuda_kernels_are_handed(tree, monkeypatch, kv_heads):
    monkeypatch.setattr(tree_attention, "aten", StandIn)
    q, k, v = draw(kv_heads)
    flat = (x[0].transpose(0, 1) for x in (q, k, v))
    made = TreeAttention.apply(*flat, tree, 0.5, tree_attention.OnCUDA)[None]
    assert_agree(made, unshared(q, k, v, Scores(0.5)), [q, k, v], 1e-12)


@pytest.mark.parametrize("block", [4, 512])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window,chunk", [(None, None), (1, None), (4, None), (9, None), (None, 4), (None, 10)])
def test_under_a_mask(tree, monkeypatch, window, chunk, softcap, sinks, block):
    monkeypatch.setattr(exact, "BLOCK", block)
    q, k, v = draw(2, size=6)
    logits = torch.linspace(-1, 1, HEADS, dtype=torch.float64).requires_grad_() if sinks else None
    scores = Scores(0.4, window, softcap, logits)
    packing = tree if chunk is None else tree.chunked(chunk)
    assert kernels_for(q, v, packing, scores) is None
    leaves = [q, k, v] + ([logits] if sinks else [])
    assert_agree(attend_tree(q, k, v, packing, scores), unshared(q, k, v, scores, chunk), leaves, 1e-12)


def test_who_is_masked(tree):
    q, _, v = draw(2)
    for scores in (Scores(dropout=0.1), Scores(window=31), Scores(softcap=3.0), Scores(sinks=torch.zeros(HEADS))):
        assert kernels_for(q, v, tree, scores) is None
    assert kernels_for(q, v, tree, Scores(window=32)) and kernels_for(q, v, tree.chunked(31), Scores()) is None
    q, k, v = draw(2)
    made = attend_masked(q, k, v, tree, Scores(dropout=0.5))
    assert made.isfinite().all() and not torch.equal(made, attend_masked(q, k, v, tree, Scores()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_as_exact_as_unshared(tree, dtype):
    truth = draw(2)
    low = [x.detach().to(dtype).requires_grad_() for x in truth]
    exactly = [x.detach().double().requires_grad_() for x in low]
    want = unshared(*exactly, Scores())
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted = [want, *torch.autograd.grad(want, exactly, upstream.double())]

    def errors(made) -> list[float]:
        got = [made, *torch.autograd.grad(made, low, upstream)]
        return [float((a.double() - b).norm().detach()) for a, b in zip(got, wanted, strict=True)]

    ours, plain = errors(attend_tree(*low, tree, Scores())), errors(unshared(*low, Scores()))
    eps = torch.finfo(dtype).eps
    assert all(a <= 1.5 * b + eps for a, b in zip(ours, plain, strict=True)), (ours, plain)


def test_a_nan_stays_in_its_completion(tree):
    q, k, v = draw(2)
    poisoned = v.detach().clone()
    poisoned[:, :, 5:8] = torch.nan  # the first completion
    made = attend_tree(q, k, poisoned, tree, Scores())[0].isnan().flatten(1).any(1)
    assert made[5:8].all() and not made[:5].any() and not made[8:].any()


# -- models ------------------------------------------------------------------------------------------------------------
def taught(model, samples, objective, share: bool, budget: int = 10_000, unit: int = 1, how: Forward | None = None):
    """(loss, log-probs [all trained tokens], gradients) of one optimizer step, and the tokens it took."""
    how = Forward(1.0, ("entropy",)) if how is None else how
    model.zero_grad()
    micros = plan([dataclasses.replace(s) for s in samples], budget, CPU, unit, share_prompts=share)
    loss, logprobs = 0.0, {}
    for micro in prepare(model, objective, micros, how):
        out = loss_of(model, objective, micro, how)
        out.loss.backward()
        loss += float(out.loss.detach())
        bounds = micro.batch.cu_seqlens.tolist()
        for i, a, b in zip(micro.indices, bounds, bounds[1:], strict=False):
            logprobs[i] = out.stats.logprobs[a:b].detach()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss, torch.cat([logprobs[i] for i in sorted(logprobs)]), gradients, sum(len(m.input_ids) for m in micros)


def assert_same_step(a, b, tolerance: float = 1e-5) -> None:
    assert a[0] == pytest.approx(b[0], rel=tolerance, abs=tolerance)
    torch.testing.assert_close(a[1], b[1], atol=tolerance, rtol=tolerance)
    assert a[2].keys() == b[2].keys() and any(x.any() for x in a[2].values())
    for name, x in a[2].items():
        assert (x - b[2][name]).norm() <= tolerance * max(1e-3, float(b[2][name].norm())), name


SHARING = ["llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "phi", "gpt_oss", "llama4", "minicpm3"]


@pytest.mark.parametrize("name", SHARING)
def test_architectures(name):
    """Windows of 8 and chunks of 8 lie inside of prompts and completions here."""
    dtype = torch.float32 if name == "gpt_oss" else torch.float64  # its experts know no float64
    model = pack_model(zoo.make(name, dtype))  # in eval mode: dropout would draw for other tokens
    assert model.shares and not model.notes
    samples, objective = groups(0), losses.get("ppo_clip")
    alone = taught(model, samples, objective, share=False)
    together = taught(model, samples, objective, share=True)
    assert together[3] < 0.8 * alone[3]
    # transformers rounds some steps of float64 to float32
    assert_same_step(together, alone, 1e-5 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("name", ["mamba", "lfm2", "recurrent_gemma"])
def test_architectures_that_cannot_say_so_and_are_exact(name):
    with pytest.warns(UserWarning, match="no prompt shared"):
        model = pack_model(zoo.make(name))
    assert not model.shares and "no prompt shared" in model.notes[0]
    samples, objective = groups(0), losses.get("nll")
    assert_same_step(taught(model, samples, objective, True), taught(model, samples, objective, False))


@pytest.fixture(scope="module")
def llama():
    return pack_model(zoo.make("llama"))


GROUPED = ["ppo_clip", "grpo", "dapo", "gspo", "rloo", "kto", "nll"]
PAIRED = ["dpo", "ipo", "orpo", "simpo", "dpo_nll", "cpo"]


@pytest.mark.parametrize("budget", [10_000, 40, 1])
@pytest.mark.parametrize("name", GROUPED)
def test_losses_of_groups_at_any_budget(llama, name, budget):
    samples = groups(1)
    for i, sample in enumerate(samples):
        sample.fields |= {"label": i % 2 == 0, "reward": float(i % 3), "kl": 0.1 * i}
    objective = losses.get(name)
    assert_same_step(taught(llama, samples, objective, True, budget), taught(llama, samples, objective, False))


@pytest.mark.parametrize("prompt_trained", [False, True])
@pytest.mark.parametrize("budget", [10_000, 40, 1])
@pytest.mark.parametrize("name", PAIRED)
def test_losses_of_pairs_at_any_budget(llama, name, budget, prompt_trained):
    samples, objective = pairs(1, prompt_trained=prompt_trained), losses.get(name)
    together = taught(llama, samples, objective, True, budget, unit=2)
    alone = taught(llama, samples, objective, False, unit=2)
    assert_same_step(together, alone)
    assert together[3] == alone[3] - 5 if prompt_trained else together[3] < alone[3]  # then token 0 alone is shared


def test_ratios_are_one_in_every_bit_and_runs_repeat(llama):
    samples, objective = groups(2), losses.get("ppo_clip")
    first = taught(llama, samples, objective, True, 60)
    again = taught(llama, samples, objective, True, 60)
    assert torch.equal(first[1], again[1]) and all(torch.equal(x, again[2][n]) for n, x in first[2].items())
    model, how = llama, Forward()
    for micro in plan(samples, 60, CPU, share_prompts=True):
        with torch.no_grad():
            scored = model(micro.input_ids, micro.cu_seqlens, rows=micro.rows, targets=micro.batch.targets)
        assert torch.equal(scored.logprobs, loss_of(model, objective, micro, how).stats.logprobs)


def test_with_gradient_checkpointing():
    model = pack_model(zoo.make("qwen3")).train()
    samples, objective = groups(4), losses.get("ppo_clip")
    want = taught(model, samples, objective, True)
    model.gradient_checkpointing_enable()
    got = taught(model, samples, objective, True)
    assert all(torch.equal(x, got[2][n]) for n, x in want[2].items())


def test_with_adapters():
    peft = pytest.importorskip("peft")
    plain = zoo.make("llama")
    options = peft.LoraConfig(target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(options, plain)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lora" in name)
    model = pack_model(plain).train()
    samples, objective = groups(5), losses.get("ppo_clip")
    together = taught(model, samples, objective, True)
    assert together[2] and all("lora" in name for name in together[2])
    assert_same_step(together, taught(model, samples, objective, False))


@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16(autocast):
    """No further from the truth than a pack that shares nothing, at a like rounding."""
    model = pack_model(zoo.make("qwen3"))
    samples, objective = groups(6), losses.get("nll")
    truth = taught(model, samples, objective, False)
    if not autocast:
        model = pack_model(zoo.make("qwen3", torch.bfloat16))
    how = Forward(autocast=torch.bfloat16 if autocast else None)
    errors = []
    for share in (True, False):
        _, logprobs, gradients, _ = taught(model, samples, objective, share, how=how)
        errors.append([float((logprobs.float() - truth[1]).norm())])
        errors[-1] += [float((x.float() - truth[2][n]).norm()) for n, x in gradients.items()]
    ratios = [a / max(b, 1e-6) for a, b in zip(*errors, strict=True)]
    assert sum(ratios) / len(ratios) < 1.3 and max(ratios) < 3, max(ratios)


def on_two_ranks(budget: int) -> None:
    """FSDP2 with checkpointing, each rank its own micro-batches, against one process that shares nothing."""
    flags = SimpleNamespace(sequence_parallel_size=1, sharding="full", shard_size=None)
    rank = dist.get_rank()
    world = World(rank, 2, rank, CPU, mesh_of(flags, 2, "cpu"))
    model, samples, objective = pack_model(zoo.make("qwen3")), groups(8), losses.get("ppo_clip")
    loss, logprobs, gradients, _ = taught(model, samples, objective, False)
    model.zero_grad()
    model.train().gradient_checkpointing_enable()
    shard(model, world, ShardOptions())
    total = 0.0
    micros = plan(samples, budget, CPU, world=world, share_prompts=True)
    assert any(isinstance(m.cu_seqlens, Layout) for m in micros)
    for micro in prepare(model, objective, micros, Forward(), world):
        out = loss_of(model, objective, micro, Forward())
        out.loss.backward()
        total += float(out.loss.detach())
    got = {name: full(p.grad) for name, p in model.named_parameters()}
    everywhere = world.sums({"loss": total})["loss"]
    assert_same_step((everywhere, logprobs, got), (loss, logprobs, gradients))


def test_with_sharded_weights():
    run_ranks(2, on_two_ranks, 60)


def test_positions_beyond_the_context_are_refused(llama):
    layout = Layout((0, 100, 128, 150), (-1, 0, 0))
    llama.hidden(torch.zeros(150, dtype=torch.long), layout)
    with pytest.raises(ValueError, match="sequence 1 has 129 tokens but .* positions for 128"):
        llama.hidden(torch.zeros(150, dtype=torch.long), Layout((0, 100, 129, 150), (-1, 0, 0)))


# -- mistakes that must be seen ----------------------------------------------------------------------------------------
def blind(query, key, value, packing, scores):
    """Completions that do not see their prompt."""
    return attend_packed(query, key, value, dataclasses.replace(packing, parents=None), scores)


def own_gradient_only(ctx, d_out):
    """The prompt's keys get no gradient from the completions."""
    saved = tree_attention.Saved(d_out, *ctx.saved_tensors)
    return *ctx.kernels.own_backward(saved, ctx.packing, ctx.scale), None, None, None


def test_a_model_that_reads_shared_prompts_wrongly_gets_copies(monkeypatch):
    monkeypatch.setattr(attention, "attend_tree", blind)
    with pytest.warns(UserWarning, match="shared prompts change or fail .* gets its own copy"):
        model = pack_model(zoo.make("llama"))
    assert not model.shares and model.packed
    samples, objective = groups(0), losses.get("nll")
    assert_same_step(taught(model, samples, objective, True), taught(model, samples, objective, False))


@pytest.mark.parametrize("mistake", ["forward", "backward"])
def test_the_comparison_above_can_fail(llama, monkeypatch, mistake):
    if mistake == "forward":
        monkeypatch.setattr(attention, "attend_tree", blind)
    else:
        monkeypatch.setattr(TreeAttention, "backward", staticmethod(own_gradient_only))
    samples, objective = groups(0), losses.get("nll")
    together, alone = (taught(llama, samples, objective, share) for share in (True, False))
    assert (together[0] == pytest.approx(alone[0], rel=1e-5)) == (mistake == "backward")
    with pytest.raises(AssertionError):
        assert_same_step(together, alone)


# -- stages ------------------------------------------------------------------------------------------------------------
REWARDS = """
def closeness(prompts, completions, answer, **columns):
    return [sum(x == y for x, y in zip(c, a)) - 0.1 * len(c) for c, a in zip(completions, answer)]
"""
ONLINE = {"num_generations": 4, "max_completion_length": 5}
STAGES = {
    "dpo": (DPOConfig, {}),
    "reward": (RewardConfig, {}),
    "grpo": (GRPOConfig, {**ONLINE, "beta": 0.05, "num_iterations": 2, "steps_per_generation": 1}),
    "rloo": (RLOOConfig, {**ONLINE, "num_iterations": 2, "steps_per_generation": 1}),
    "ppo": (PPOConfig, {"max_completion_length": 5, "num_ppo_epochs": 2, "bootstrap_truncated": True}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    (root / "rewards.py").write_text(REWARDS)
    return {"model": tiny.make_model(root / "model"), "rewards": root / "rewards.py", **tiny.make_data(root / "data")}


def trained(stage: str, place: dict, out: Path, **options) -> list[dict]:
    kind, own = STAGES[stage]
    data = place["dpo" if stage in ("dpo", "reward") else "grpo"]
    shared = {"model_name_or_path": str(place["model"]), "dataset_name": str(data), "output_dir": str(out)}
    shared |= {"max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1}
    if stage in ("grpo", "rloo", "ppo"):
        shared["reward_funcs"] = [f"{place['rewards']}:closeness"]
    else:
        shared |= {"eval_strategy": "steps", "eval_steps": 2}
    run(kind(**{**shared, **own, **options}))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_stages_learn_the_same(stage, place, tmp_path, monkeypatch):
    monkeypatch.setattr("fastrl.train.loop.plot_run", lambda path: None)
    seen = []

    def watched(*given, **options):
        micros = plan(*given, **options)
        seen.extend(m for m in micros if isinstance(m.cu_seqlens, Layout))
        return micros

    monkeypatch.setattr(base, "plan", watched)
    records = {}
    for share, budget in ((False, 8192), (True, 8192), (True, 24)):
        seen.clear()
        out = tmp_path / f"{share}{budget}"
        records[share, budget] = trained(stage, place, out, share_prompts=share, max_tokens_per_device=budget)
        assert bool(seen) == (share and stage != "ppo")
    names = ("loss", "grad_norm", "eval_loss", "entropy", "kl", "mean_reward", "num_tokens", "val/explained_variance")
    want = [{n: r[n] for n in names if n in r} for r in records.pop((False, 8192))]
    for made in records.values():
        got = [{n: r[n] for n in names if n in r} for r in made]
        assert len(got) == len(want) and [r.keys() for r in got] == [r.keys() for r in want]
        for a, b in zip(got, want, strict=True):
            assert a == pytest.approx(b, rel=2e-4, abs=2e-6)


def test_a_critic_and_a_reward_model_read_shared_prompts(place):
    """Values at every row and at the last token of each sample: what PPO and the reward stage ask for."""
    model = load_reward_model(place["model"])
    torch.nn.init.normal_(model.head.weight)
    samples = groups(7, words=19)
    shared, plain = (plan(samples, 10_000, CPU, share_prompts=share)[0] for share in (True, False))
    assert model.shares and isinstance(shared.cu_seqlens, Layout)
    values, want = (model.values(m.input_ids, m.cu_seqlens) for m in (shared, plain))
    for name in ("rows", "here", "ends"):
        torch.testing.assert_close(values[getattr(shared, name)], want[getattr(plain, name)], atol=1e-5, rtol=1e-5)
    plain_model = load_causal_lm(place["model"], attn_implementation="eager")
    assert not plain_model.shares and torch.allclose(
        plain_model.hidden(shared.input_ids, shared.cu_seqlens)[shared.rows],
        plain_model.hidden(plain.input_ids, plain.cu_seqlens)[plain.rows],
        atol=1e-5,
    )
