"""Models against transformers: log-probs, packing, head, saving, and what is refused."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AutoModelForCausalLM, BertConfig, BertLMHeadModel

from fastrl import TokenBatch, losses
from fastrl.models import (
    LMHead,
    LogitTransform,
    UnsupportedModelError,
    check_parity,
    load_causal_lm,
    load_reference,
    load_tokenizer,
    pack_model,
    save_pretrained,
)
from fastrl.models.attention import NAMES, packed_attention
from fastrl.models.packed import next_tokens

LENGTHS = (11, 23, 5, 23, 1, 14)
PACKED = [*zoo.DENSE, *zoo.OTHERS]


def own_logprobs(model, parts: list[torch.Tensor]) -> torch.Tensor:
    """[T] transformers' own logits of each document by itself, log_softmax in float64; 0 in the last rows."""
    rows = []
    with torch.no_grad():
        for ids in parts:
            logits = model(ids[None], use_cache=False).logits[0, :-1].double()
            rows += [torch.log_softmax(logits, -1).gather(1, ids[1:, None]).squeeze(1), torch.zeros(1).double()]
    return torch.cat(rows)


def packed_logprobs(model, parts: list[torch.Tensor], **options) -> torch.Tensor:
    with torch.no_grad():
        return model.logprobs(torch.cat(parts), zoo.boundaries(parts), **options).logprobs


# -- log-probs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PACKED)
def test_packed_logprobs_are_those_of_transformers(name):
    plain = zoo.make(name)
    parts = zoo.documents(LENGTHS)
    want = own_logprobs(plain, parts)
    model = pack_model(plain)
    assert model.packed and not model.notes
    assert want.std() > 0.5  # far from uniform: a wrong cap, scale or position would show
    torch.testing.assert_close(packed_logprobs(model, parts).double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own_logprobs(plain, parts), want, atol=0, rtol=0)  # plain calls did not change


@pytest.mark.parametrize("name", list(zoo.DENSE))
def test_float64(name):
    """The head to 1e-10. The body only to float32 rounding: transformers norms, rotates or softmaxes in float32."""
    model = pack_model(zoo.make(name, torch.float64))
    parts = zoo.documents(LENGTHS)
    assert model.packed
    torch.testing.assert_close(packed_logprobs(model, parts), own_logprobs(model.model, parts), atol=1e-5, rtol=1e-5)
    ids = parts[1]
    with torch.no_grad():
        hidden = model.body(input_ids=ids[None], use_cache=False)[0][0]
        got = model.head(hidden[:-1], targets=ids[1:]).logprobs
    torch.testing.assert_close(got, own_logprobs(model.model, [ids])[:-1], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss"])
def test_bfloat16_is_as_exact_as_transformers(name):
    parts = zoo.documents(LENGTHS)
    truth = own_logprobs(zoo.make(name, torch.bfloat16).float(), parts)
    model = pack_model(zoo.make(name, torch.bfloat16))
    ours = (packed_logprobs(model, parts).double() - truth).square().mean().sqrt()
    theirs = (own_logprobs(model.model, parts) - truth).square().mean().sqrt()
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("name", zoo.STATEFUL)
def test_state_space_models_run_one_sequence_at_a_time(name):
    plain, parts = zoo.make(name), zoo.documents(LENGTHS)
    want = own_logprobs(plain, parts)
    before = plain.config._attn_implementation
    with pytest.warns(UserWarning, match=f"{type(plain).__name__} one sequence at a time"):
        model = pack_model(plain)
    assert not model.packed and len(model.notes) == 1 and plain.config._attn_implementation == before
    torch.testing.assert_close(packed_logprobs(model, parts).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2", "llama4"])
def test_no_mask_of_the_pack_is_formed(name):
    model, parts = pack_model(zoo.make(name)), zoo.documents((40, 30, 31))
    total = sum(len(p) for p in parts)

    class NoSquare(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            shape = out.shape if isinstance(out, torch.Tensor) else ()
            assert tuple(shape[-2:]) != (total, total), func
            return out

    with NoSquare():
        packed_logprobs(model, parts)


def test_loss_and_rows_agree_with_autograd_through_logits():
    plain, parts = zoo.make("gemma2"), zoo.documents((9, 17))
    model, ids, cu_seqlens = pack_model(copy.deepcopy(plain)), torch.cat(parts), zoo.boundaries(parts)
    targets = next_tokens(ids, cu_seqlens)
    rows = torch.tensor([2, 3, 8, 11, 20]) - 1
    batch = TokenBatch(targets=targets[rows], cu_seqlens=torch.tensor([0, 2, 5]))
    loss = model.loss(losses.get("nll"), ids, cu_seqlens, batch, rows).loss
    loss.backward()
    logits = torch.cat([plain(p[None]).logits[0] for p in parts])
    want = torch.nn.functional.cross_entropy(logits[rows], targets[rows])
    want.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-5)
    for (name, ours), theirs in zip(model.model.named_parameters(), plain.parameters(), strict=True):
        worst = (ours.grad - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert worst < 1e-4, (name, worst)


def test_logprobs_take_a_mask_and_options():
    model, parts = pack_model(zoo.make("llama")), zoo.documents((9, 17))
    ids, cu_seqlens = torch.cat(parts), zoo.boundaries(parts)
    full = model.logprobs(ids, cu_seqlens, temperature=0.7, outputs=("logprobs", "entropy"))
    mask = torch.arange(26) % 2 == 0
    some = model.logprobs(ids, cu_seqlens, mask, temperature=0.7)
    assert full.entropy.shape == (26,) and full.logprobs[8] == 0 and full.logprobs[25] == 0
    torch.testing.assert_close(some.logprobs, full.logprobs.masked_fill(~mask, 0.0))


def test_gradient_checkpointing_recomputes_the_same():
    grads = []
    for checkpointing in (False, True):
        model = pack_model(zoo.make("gemma2")).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        parts, calls = zoo.documents(LENGTHS), []
        model.body.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.logprobs(torch.cat(parts), zoo.boundaries(parts)).logprobs.sum().backward()
        assert len(calls) == 1 + checkpointing
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


# -- the check at load -----------------------------------------------------------------------------------------------
def test_a_leaking_implementation_is_caught():
    def leaky(*args, packing=None, **options):
        whole = None if packing is None else type(packing).from_bounds((0, packing.bounds[-1]), torch.device("cpu"))
        return packed_attention(*args, packing=whole, **options)

    model = zoo.make("llama")
    packed = pack_model(model)
    AttentionInterface.register(NAMES["sdpa"], leaky)
    with pytest.warns(UserWarning, match="LlamaForCausalLM one sequence at a time"):
        check_parity(packed)
    AttentionInterface.register(NAMES["sdpa"], packed_attention)
    assert not packed.packed and "mix" in packed.notes[0]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "cohere", "granite"])
@pytest.mark.parametrize("wrong", [LogitTransform(scale=2.0), LogitTransform(softcap=50.0), LogitTransform(0.5, 30.0)])
def test_a_wrong_logit_transform_is_caught_even_by_tiny_logits(name, wrong):
    plain = zoo.make(name)
    with torch.no_grad():  # logits so small that a cap makes no difference to them
        plain.get_output_embeddings().weight.mul_(1e-3)
    packed = pack_model(plain)
    packed.head.transform = wrong
    with pytest.raises(UnsupportedModelError, match="transforms its logits"):
        check_parity(packed)


def test_a_head_that_is_not_the_last_step_is_refused():
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, is_decoder=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedModelError, match="BertLMHeadModel"):
            pack_model(BertLMHeadModel(config).eval())


def test_the_check_leaves_modes_and_randomness_alone():
    plain = zoo.make("llama").train()
    plain.model.norm.eval()
    state = torch.get_rng_state()
    pack_model(plain)
    assert plain.training and not plain.model.norm.training and torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled() and all(p.grad is None for p in plain.parameters())


# -- the head in its place -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["qwen3", "llama", "gpt2", "gemma2", "phi"])
def test_head_owns_the_same_parameters(name):
    plain = zoo.make(name)
    keys, weight = list(plain.state_dict()), plain.get_output_embeddings().weight
    model = pack_model(plain)
    assert isinstance(model.head, LMHead) and model.head is plain.get_output_embeddings()
    assert model.head.weight is weight and list(plain.state_dict()) == keys
    tied = plain.config.tie_word_embeddings
    assert (plain.get_input_embeddings().weight is weight) == tied
    assert sum(p is weight for p in model.parameters()) == 1


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "mistral", "gpt_oss", "granite"])
def test_generation_is_unchanged(name):
    plain = zoo.make(name)
    ids = torch.stack(zoo.documents((12, 12)))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0  # padded on the left
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = plain.generate(ids, attention_mask=mask, **options)
    assert torch.equal(pack_model(plain).model.generate(ids, attention_mask=mask, **options), want)


def test_a_wrapped_head_is_refused():
    peft = pytest.importorskip("peft")
    model = pack_model(zoo.make("llama"))
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"])
    model.model = peft.get_peft_model(model.model, config).base_model.model
    with pytest.raises(UnsupportedModelError, match="lm_head"):
        packed_logprobs(model, zoo.documents((5,)))


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # an own head, a tied one
def test_fsdp2_hooks_see_every_read_of_a_weight(name, tmp_path):
    """Sharded over one rank: outside of its module's forward a weight is a DTensor, which no operator here takes."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model, parts = pack_model(zoo.make(name)), zoo.documents((9, 17))
    plain = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = list(model.body.layers) + ([] if model.model.config.tie_word_embeddings else [model.head])
        for module in (*sharded, model):
            fully_shard(module, mesh=mesh)
        assert isinstance(model.head, LMHead) and isinstance(model.head.weight, DTensor)
        for each in (model, plain):
            each.logprobs(torch.cat(parts), zoo.boundaries(parts)).logprobs.sum().backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    finally:
        dist.destroy_process_group()


def test_head_refuses_half_a_call():
    model = pack_model(zoo.make("llama"))
    with pytest.raises(ValueError, match="go together"):
        model.head(torch.zeros(3, 32), objective=losses.get("nll"))


# -- from and to directories -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "granite", "cohere"])
def test_saved_models_load_with_plain_transformers(name, tmp_path):
    zoo.make(name).save_pretrained(tmp_path / "start")
    model = load_causal_lm(tmp_path / "start")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    parts = zoo.documents(LENGTHS)
    save_pretrained(model, None, tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    torch.testing.assert_close(packed_logprobs(model, parts).double(), own_logprobs(again, parts), atol=1e-5, rtol=0)
    tied = again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert tied == model.model.config.tie_word_embeddings
    assert "fastrl" not in (tmp_path / "trained" / "config.json").read_text()
    names = {p.name for p in (tmp_path / "trained").iterdir()}
    assert "model.safetensors" in names and not any(n.endswith((".bin", ".pt", ".pkl")) for n in names)
    sizes = {(tmp_path / d / "model.safetensors").stat().st_size for d in ("start", "trained")}
    assert len(sizes) == 1
    reloaded = load_causal_lm(tmp_path / "trained")
    torch.testing.assert_close(packed_logprobs(reloaded, parts), packed_logprobs(model, parts))


@pytest.fixture
def saved(tmp_path):
    zoo.make("qwen3").save_pretrained(tmp_path)
    return tmp_path


def test_dtypes_and_references(saved):
    assert load_causal_lm(saved, torch.bfloat16).head.weight.dtype == torch.bfloat16
    reference = load_reference(saved)
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    assert not packed_logprobs(reference, zoo.documents((7,))).requires_grad


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_own_attention_on_request(saved, attention):
    model, parts = load_causal_lm(saved, attn_implementation=attention), zoo.documents(LENGTHS)
    assert not model.packed and model.model.config._attn_implementation == attention
    torch.testing.assert_close(packed_logprobs(model, parts), packed_logprobs(load_causal_lm(saved), parts))


def test_attention_from_the_hub_is_refused(saved):
    with pytest.raises(ValueError, match="attn_implementation is 'someone/kernel'"):
        load_causal_lm(saved, attn_implementation="someone/kernel")


def test_code_of_a_model_is_never_run(saved):
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "canary.Config", "AutoModelForCausalLM": "canary.Model"}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "canary.py").write_text(f"open({str(saved / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(UnsupportedModelError, match="auto_map: AutoConfig, AutoModelForCausalLM"):
        load_causal_lm(saved)
    (saved / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["canary.T", None]}}))
    with pytest.raises(UnsupportedModelError, match="auto_map: AutoTokenizer"):
        load_tokenizer(saved)
    assert not (saved / "ran").exists()


def test_pickled_weights_are_refused(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(saved)


def test_missing_weights_are_refused(saved):
    from safetensors.torch import load_file, save_file

    weights = load_file(saved / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(saved)


def test_no_model_there(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        load_causal_lm(tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        load_causal_lm("/nowhere/at/all")


def test_a_tokenizer_larger_than_the_model_is_refused(saved):
    class Tokenizer:
        def __len__(self):
            return 90

        def get_vocab(self):
            return {"a": 0, "b": 97}  # ids need not be dense

    with pytest.raises(ValueError, match="has 98 tokens but the model only 97"):
        load_causal_lm(saved, tokenizer=Tokenizer())


# -- inputs that do not fit ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ids", "cu_seqlens", "message"),
    [
        (torch.ones(2, 3).long(), [0, 6], r"input_ids is \[2, 3\]"),
        (torch.ones(6).long(), [0, 5], "rise from 0 to T=6"),
        (torch.ones(6).long(), [1, 6], "rise from 0 to T=6"),
        (torch.ones(6).long(), [0, 4, 3, 6], "rise from 0 to T=6"),
        (torch.ones(133).long(), [0, 3, 133], "sequence 1 has 130 tokens .* positions for 128"),
    ],
)
def test_bad_packs(ids, cu_seqlens, message):
    model = pack_model(zoo.make("llama"))
    with pytest.raises(ValueError, match=message):
        model.hidden(ids, torch.tensor(cu_seqlens))


def test_empty_sequences_and_packs():
    model, parts = pack_model(zoo.make("mistral")), zoo.documents((9, 0, 17, 0))
    got = packed_logprobs(model, parts)
    torch.testing.assert_close(got, packed_logprobs(model, [parts[0], parts[2]]), atol=0, rtol=0)
    assert packed_logprobs(model, zoo.documents((0,))).shape == (0,)
