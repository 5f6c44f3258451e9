"""PEFT adapters on any layer, the head among them: a patched model against the same one unpatched."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import pytest
import torch
import zoo
from oracle import Watch
from test_integrations_trainer import train
from test_integrations_transformers import gradients, inputs

from fastrl.integrations import DeferredLogits, causal_lm_of, deferring, head_of, heads
from fastrl.integrations.transformers import patch, unpatch
from fastrl.models import UnsupportedModelError
from fastrl.models import linear as forms

peft = pytest.importorskip("peft")

BODY = ["q_proj", "v_proj", "up_proj"]
CONFIGS = {
    "body": dict(target_modules=BODY),
    "head": dict(target_modules=["lm_head"]),
    "body and head": dict(target_modules=[*BODY, "lm_head"], r=3, lora_alpha=12),
    "head trained whole": dict(target_modules=BODY, modules_to_save=["lm_head"]),
    "embedding": dict(target_modules=[*BODY, "embed_tokens"]),
    "rslora": dict(target_modules=["lm_head"], use_rslora=True),
    "biases": dict(target_modules=["lm_head"], lora_bias=True),
    "dora in the body": dict(target_modules=BODY, use_dora=True),
    "new tokens": dict(target_modules=BODY, trainable_token_indices=[3, 8, 90]),
    "all biases": dict(target_modules=BODY, bias="all"),
}


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **options):
    """A model with adapters that already say something: both factors random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied weights
        model = peft.get_peft_model(zoo.make(name, dtype), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    stir(model, seed)
    return model


def stir(model, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name or "modules_to_save" in name or "delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def assert_same(plain, mine, tolerance: float = 1e-5, **given) -> None:
    given = inputs() | given
    want, got = plain(**given), mine(**given)
    assert isinstance(got.logits, DeferredLogits) and got.loss.dtype == want.loss.dtype
    torch.testing.assert_close(got.loss, want.loss, atol=0, rtol=tolerance)
    if not want.loss.requires_grad:
        assert not got.loss.requires_grad
        return
    theirs, ours = gradients(plain, want.loss), gradients(mine, got.loss)
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert ours[name].dtype == grad.dtype, name
        error = (ours[name] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error <= tolerance, (name, float(error))


# -- the same loss and gradients ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("when", ["before", "after"])
def test_loss_and_gradients_of_every_adapter(kind, when):
    plain = adapted(**CONFIGS[kind])
    if when == "after":
        mine = patch(copy.deepcopy(plain))
    else:
        mine = peft.get_peft_model(patch(zoo.make("llama")), peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS[kind]))
        stir(mine)
    assert_same(plain, mine)
    assert_same(plain, mine, num_items_in_batch=41)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "cohere", "phi", "minicpm3"])  # tied, capped, scaled, biased
@pytest.mark.parametrize("kind", ["body and head", "head trained whole", "new tokens"])
def test_architectures(name, kind):
    layers = r".*(q_proj|v_proj|lm_head)" if kind == "body and head" else r".*(v_proj|kv_b_proj)"
    plain = adapted(name, **CONFIGS[kind] | {"target_modules": layers})
    assert_same(plain, patch(copy.deepcopy(plain)), 2e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_new_tokens_of_a_tied_head(name):
    plain = adapted(name, **CONFIGS["new tokens"])
    assert "TrainableTokens" in type(causal_lm_of(plain).lm_head).__name__
    mine = patch(copy.deepcopy(plain))
    with plain.disable_adapter(), mine.disable_adapter():
        assert_same(plain, mine, 2e-5)
    assert_same(plain, mine, 2e-5)


def test_in_a_trainer(tmp_path):
    plain = adapted(**CONFIGS["body and head"])
    mine = patch(copy.deepcopy(plain))
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    want, _ = train(plain, tmp_path / "plain", **options)
    got, _ = train(mine, tmp_path / "mine", **options)
    torch.testing.assert_close(got, want, atol=0, rtol=1e-4)


def test_gpt2_names_its_layers_otherwise():
    options = {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = adapted("gpt2", **options)
    assert_same(plain, patch(copy.deepcopy(plain)))


def test_dropout_on_the_head_is_the_same_draw():
    plain = adapted(target_modules=["lm_head"], lora_dropout=0.3).train()
    mine = patch(copy.deepcopy(plain))
    results = []
    for model in (plain, mine):
        torch.manual_seed(5)
        loss = model(**inputs()).loss
        results.append((loss.detach(), gradients(model, loss)))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)


def test_float32_adapters_over_bfloat16():
    truth = adapted(**CONFIGS["body and head"])
    with torch.no_grad():
        for parameter in truth.parameters():
            parameter.copy_(parameter.bfloat16())
    plain = copy.deepcopy(truth)
    for name, parameter in plain.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    made = []
    for model in (truth, plain, patch(copy.deepcopy(plain))):
        loss = model(**inputs()).loss
        made.append((loss.double(), gradients(model, loss)))
    (want, exact), (theirs, plain_grads), (ours, own_grads) = made
    assert (ours - want).abs() <= 1.5 * (theirs - want).abs() + 1e-3 * want.abs()
    for which in ("lm_head", "q_proj"):
        flat = [torch.cat([g.flatten() for n, g in x.items() if which in n]) for x in (own_grads, plain_grads, exact)]
        error, allowed = ((x - flat[2]).norm() for x in flat[:2])
        assert flat[0].dtype == torch.float32 and error <= 1.5 * allowed + 2**-8 * flat[2].norm()


def test_no_logits_are_formed_with_an_adapter_on_the_head():
    size, rank, rows, length = 4001, 8, 4, 64
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(zoo.make("llama", vocab_size=size), peft.LoraConfig(target_modules=["lm_head"]))
    patch(model, workspace_bytes=1 << 18)
    with Watch() as watch:
        model(**inputs(rows=rows, length=length)).loss.backward()
    assert watch.largest <= size * (32 + rank) < rows * length * size


# -- adapters come and go ----------------------------------------------------------------------------------------------
def test_disabled_merged_and_switched():
    plain = adapted(**CONFIGS["body and head"])
    plain.add_adapter("second", peft.LoraConfig(target_modules=["lm_head", "v_proj"], r=5))
    stir(plain, 1)
    mine = patch(copy.deepcopy(plain))
    assert_same(plain, mine)
    with plain.disable_adapter(), mine.disable_adapter():
        assert_same(plain, mine)
    for model in (plain, mine):
        model.set_adapter("second")
    assert_same(plain, mine)
    for model in (plain, mine):
        model.base_model.set_adapter(["default", "second"])  # both at once
    assert_same(plain, mine)
    for model in (plain, mine):
        model.merge_adapter()
    assert_same(plain, mine)
    for model in (plain, mine):
        model.unmerge_adapter()
    assert_same(plain, mine)
    base = [model.merge_and_unload() for model in (plain, mine)]
    assert_same(*base)
    assert unpatch(base[1]) is base[1]


def test_a_trained_head_switched_off_is_the_base_head():
    plain = adapted(**CONFIGS["head trained whole"])
    mine = patch(copy.deepcopy(plain))
    with plain.disable_adapter(), mine.disable_adapter():
        assert_same(plain, mine)
    assert_same(plain, mine)


def test_the_models_inside():
    model = adapted(**CONFIGS["head"])
    assert type(causal_lm_of(model)).__name__ == "LlamaForCausalLM" and type(head_of(model).module).__name__ == "Linear"
    form = head_of(model).form(torch.zeros(2, 32))
    assert form.weight.shape == (97, 32 + 8) and form.hidden.shape == (2, 40)
    ids = inputs()["input_ids"]
    want = model(ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    with deferring(model):
        got = model(ids).logits[:, :-1].logprobs(ids[:, 1:]).logprobs
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_prompt_tuning_lengthens_the_labels():
    plain = peft.get_peft_model(zoo.make("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert_same(plain, patch(copy.deepcopy(plain)))


def test_generation_and_saving_are_unchanged(tmp_path):
    plain = adapted(**CONFIGS["body and head"])
    mine = patch(copy.deepcopy(plain))
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = inputs()["input_ids"][2:]
    assert torch.equal(plain.generate(input_ids=ids, **options), mine.generate(input_ids=ids, **options))
    mine.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(zoo.make("llama"), tmp_path)
    torch.testing.assert_close(again(**inputs()).loss, plain(**inputs()).loss, atol=0, rtol=1e-6)


def test_sharded(tmp_path):
    """Sharding gives PEFT's wrapper a class of its own, and its weights are DTensors outside of its call."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    plain = adapted(**CONFIGS["body and head"])
    mine = patch(copy.deepcopy(plain))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh, inner = dist.init_device_mesh("cpu", (1,)), causal_lm_of(mine)
        for module in (*inner.model.layers, inner.lm_head, mine):
            fully_shard(module, mesh=mesh)
        want, got = plain(**inputs()).loss, mine(**inputs()).loss
        torch.testing.assert_close(got, want, atol=0, rtol=1e-5)
        theirs, ours = gradients(plain, want), gradients(mine, got)
        torch.testing.assert_close({n: g.full_tensor() for n, g in ours.items()}, theirs, atol=1e-6, rtol=1e-5)
        assert isinstance(unpatch(mine)(**inputs()).logits, torch.Tensor)
    finally:
        dist.destroy_process_group()


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.LoraConfig(target_modules=["lm_head"], use_dora=True), "adapter 'default' on the LM head is a D"),
        (lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "wrapped by PEFT's Linear"),
        (lambda: peft.LoHaConfig(target_modules=["lm_head"]), "wrapped by PEFT's Linear|wrapped by PEFT's LoHa"),
    ],
    ids=["dora", "ia3", "loha"],
)
def test_other_adapters_on_the_head_are_named(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        patch(peft.get_peft_model(zoo.make("llama"), config()))
    late = peft.get_peft_model(patch(zoo.make("llama")), config())
    with pytest.raises(UnsupportedModelError, match=message):
        late(**inputs())


def test_adapters_by_row_are_refused():
    model = patch(adapted(**CONFIGS["head"])).eval()
    with pytest.raises((UnsupportedModelError, ValueError), match="adapter_names|beside hidden states"):
        model(**inputs(), adapter_names=["default", "__base__", "default"])


# -- mistakes that must not pass ---------------------------------------------------------------------------------------
def _changed(change):
    def plant(monkeypatch):
        own = forms.parts_of
        monkeypatch.setattr(forms, "parts_of", lambda module: dataclasses.replace(own(module), **change(own(module))))

    return plant


def _frozen(monkeypatch):
    def frozen(module, hidden):
        made = forms.linear_form(module, hidden)
        return made._replace(weight=made.weight.detach())

    monkeypatch.setattr(heads, "linear_form", frozen)


MUTANTS = {
    "adapter ignored": _changed(lambda parts: {"adapters": ()}),
    "scale wrong": _changed(lambda parts: {"adapters": tuple(a._replace(scale=1.5 * a.scale) for a in parts.adapters)}),
    "factor frozen": _frozen,
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_planted_mistake_is_seen(mutant, monkeypatch):
    plain = adapted(**CONFIGS["body and head"])
    mine = patch(copy.deepcopy(plain))
    assert_same(plain, mine)
    MUTANTS[mutant](monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(plain, mine)
