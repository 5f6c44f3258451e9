"""Adapters in the trainer: the fused path against plain PEFT, the reference in the same weights, files, ranks."""

from __future__ import annotations

import copy
import gc
import importlib.util
import json
import weakref
from pathlib import Path

import pytest
import tiny
import torch
import zoo
from ranks import run_ranks
from safetensors.torch import load_file, save_file

from fastrl import losses
from fastrl.models import UnsupportedModelError, load_causal_lm, load_reward_model, load_token_classifier, pack_model
from fastrl.models import adapters as adapting
from fastrl.models import linear as forms
from fastrl.models.adapters import AdapterOptions, AdapterReference, add_adapters, load_adapters, merge_adapters
from fastrl.models.load import base_of
from fastrl.models.quantised import Quantisation, load_options, quantised_parameters
from fastrl.tokens import TokenBatch
from fastrl.train import adapted, loop, run, workbench
from fastrl.train.config import CONFIGS
from fastrl.train.flags import ConfigError
from fastrl.train.optim import build_optimizer
from fastrl.train.output_dir import Run
from fastrl.train.parallel import World
from fastrl.train.stages.base import teacher_of
from fastrl.train.step import Forward, score

peft = pytest.importorskip("peft")

BODY = ["q_proj", "v_proj", "up_proj"]
KINDS = {
    "body": {"target_modules": BODY, "r": 3},
    "all linear": {},
    "head": {"target_modules": ["lm_head"]},
    "body and head": {"target_modules": [*BODY, "lm_head"], "r": 3, "alpha": 12},
    "head whole": {"target_modules": BODY, "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": [*BODY, "embed_tokens"]},
    "rslora": {"target_modules": r".*(q_proj|lm_head)", "use_rslora": True},
    "dora": {"target_modules": BODY, "use_dora": True},
}
REWARDS = """
def closeness(prompts, completions, answer, **columns):
    return [sum(x == y for x, y in zip(c, a)) - 0.1 * len(c) for c, a in zip(completions, answer)]
"""


# -- the fused path ----------------------------------------------------------------------------------------------------
def stir(model: torch.nn.Module, scale: float = 0.2, seed: int = 0) -> None:
    """Adapters that already say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                x.add_(torch.randn(x.shape, generator=generator) * scale)


def adapted_model(name: str = "llama", dtype: torch.dtype = torch.float32, **options):
    packed = pack_model(zoo.make(name, dtype))
    add_adapters(packed, AdapterOptions(**options))
    stir(packed)
    return packed


def documents() -> tuple[torch.Tensor, torch.Tensor]:
    parts = zoo.documents((9, 5, 9, 14))
    return torch.cat(parts), zoo.boundaries(parts)


def own_loss(packed) -> torch.Tensor:
    """Mean cross-entropy of all tokens but the first of each document, by the fused path over a pack."""
    ids, bounds = documents()
    targets = torch.cat([torch.cat([d[1:], d[:1]]) for d in ids.split(bounds.diff().tolist())])
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[bounds[1:].long() - 1] = False
    rows = keep.nonzero().squeeze(1)
    starts = torch.tensor([0, *(bounds.diff() - 1).tolist()]).cumsum(0).to(torch.int32)
    batch = TokenBatch(targets[rows], torch.ones(len(rows), dtype=torch.bool), starts)
    return packed.loss(losses.get("nll"), ids, bounds, batch, rows).loss


def plain_loss(model: torch.nn.Module) -> torch.Tensor:
    """The same of transformers' own logits, one document at a time."""
    ids, bounds = documents()
    total, count = 0.0, 0
    for part in ids.split(bounds.diff().tolist()):
        logits = model(part[None], use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum")
        count += len(part) - 1
    return total / count


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_training(packed, tolerance: float = 1e-5) -> None:
    want, got = plain_loss(packed.model), own_loss(packed)
    torch.testing.assert_close(got, want, atol=0, rtol=tolerance)
    theirs, ours = gradients(packed, want), gradients(packed, got)
    trainable = {n for n, p in packed.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() == trainable and trainable
    for name, grad in theirs.items():
        error = (ours[name] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("kind", list(KINDS))
def test_losses_and_gradients_are_those_of_plain_peft(kind):
    packed = adapted_model(**KINDS[kind])
    assert_same_training(packed)
    assert all("lora_" in n or "modules_to_save" in n for n, p in packed.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "cohere", "minicpm3"])  # tied, capped, scaled, a scaled input
@pytest.mark.parametrize("kind", ["body and head", "head whole"])
def test_architectures(name, kind):
    layers = r".*(v_proj|kv_b_proj|lm_head)" if kind == "body and head" else r".*(v_proj|kv_b_proj)"
    assert_same_training(adapted_model(name, **KINDS[kind] | {"target_modules": layers}), 2e-5)


def test_experts_are_bare_parameters(tmp_path):
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"], "r": 4}
    packed, base = adapted_model("gpt_oss", **options), pack_model(zoo.make("gpt_oss"))
    assert any("experts" in n for n, p in packed.named_parameters() if p.requires_grad)
    assert_same_training(packed, 2e-5)
    reference, micro, plain = AdapterReference(packed), micro_of(), Forward()
    assert torch.equal(score(reference, micro, plain).logprobs, score(base, micro, plain).logprobs)
    packed.adapters.save(tmp_path)
    load_adapters(base, tmp_path)
    assert torch.equal(score(packed, micro, plain).logprobs, score(base, micro, plain).logprobs)


def test_checkpointing_and_generation():
    packed = adapted_model(**KINDS["body and head"])
    want = gradients(packed, own_loss(packed))
    packed.gradient_checkpointing_enable()
    packed.train()
    torch.testing.assert_close(gradients(packed, own_loss(packed)), want, atol=1e-7, rtol=1e-5)
    packed.eval()
    ids = documents()[0][None, :9]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made = packed.model.generate(ids, **options)
    plain = peft.get_peft_model(
        zoo.make("llama"), peft.LoraConfig(target_modules=[*BODY, "lm_head"], r=3, lora_alpha=12)
    )
    stir(plain)
    assert torch.equal(made, plain.generate(input_ids=ids, **options))


def test_bfloat16_base_keeps_float32_adapters():
    packed = adapted_model(dtype=torch.bfloat16, **KINDS["body and head"])
    assert {p.dtype for p in packed.parameters() if p.requires_grad} == {torch.float32}
    want, got = plain_loss(packed.model), own_loss(packed)
    assert abs(float(got - want)) < 0.02 * float(want)
    assert all(bool(g.isfinite().all()) for g in gradients(packed, got).values())


def test_an_ignored_adapter_on_the_head_is_seen_at_once(monkeypatch, tmp_path):
    """A planted mistake: the fused head without its adapter is not the model's own logits any more."""
    adapted_model(**KINDS["head"]).adapters.save(tmp_path)
    own = forms.parts_of
    monkeypatch.setattr("fastrl.models.lora_head.LoraHead.logits", lambda self, h: self.get_base_layer().logits(h))
    with pytest.raises(UnsupportedModelError, match="hidden states and head give logits"):
        load_adapters(pack_model(zoo.make("llama")), tmp_path)
    monkeypatch.undo()
    packed = adapted_model(**KINDS["head"])
    monkeypatch.setattr(forms, "parts_of", lambda m: forms.Parts(own(m).linear))
    with pytest.raises(AssertionError):
        assert_same_training(packed)


# -- what is refused ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lm_head"], "use_dora": True}, "DoRA|Dora"),
        ({"target_modules": ["q_projj"]}, "target_modules: LlamaForCausalLM has no module q_projj; .*q_proj"),
        ({"target_modules": r".*nothing"}, "has no module"),
        ({"modules_to_save": ["lm_heat"]}, "modules_to_save: .* no module lm_heat"),
    ],
    ids=["dora on the head", "unknown", "regular expression", "unknown whole"],
)
def test_what_cannot_be_adapted_is_named(options, message):
    with pytest.raises(UnsupportedModelError, match=message):
        add_adapters(pack_model(zoo.make("llama")), AdapterOptions(**options))


def test_adapters_of_other_kinds_or_with_other_weights_are_refused(tmp_path):
    peft.get_peft_model(zoo.make("llama"), peft.IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    with pytest.raises(UnsupportedModelError, match="holds IA3 adapters"):
        load_adapters(pack_model(zoo.make("llama")), tmp_path / "ia3")
    packed = adapted_model(**KINDS["body"])
    packed.adapters.save(tmp_path / "lora")
    with pytest.raises(UnsupportedModelError, match="has adapters already"):
        load_adapters(packed, tmp_path / "lora")
    place = tmp_path / "lora" / "adapter_model.safetensors"
    kept = load_file(place)
    save_file(dict(list(kept.items())[1:]) | {"base_model.model.odd.weight": torch.zeros(1)}, place)
    with pytest.raises(ValueError, match="lack base_model.* and have base_model.model.odd.weight"):
        load_adapters(pack_model(zoo.make("llama")), tmp_path / "lora")
    place.rename(place.with_name("adapter_model.bin"))
    with pytest.raises(ValueError, match="pickles"):
        load_adapters(pack_model(zoo.make("llama")), tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"megatron_config": {"a": 1}}))
    with pytest.raises(UnsupportedModelError, match="megatron_config"):
        load_adapters(pack_model(zoo.make("llama")), tmp_path / "lora")


# -- the reference -----------------------------------------------------------------------------------------------------
def micro_of(setting_rows: int = 4):
    from fastrl.data.types import Sample
    from fastrl.train.step import plan

    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 90, (6 + i,), generator=draw).tolist() for i in range(setting_rows)]
    [micro] = plan([Sample.from_parts(x[:2], x[2:]) for x in ids], 1000, torch.device("cpu"))
    return micro


@pytest.mark.parametrize("kind", ["all linear", "body and head", "head whole", "dora", "embedding"])
def test_the_reference_is_a_second_copy_of_the_base_bit_for_bit(kind):
    base = pack_model(zoo.make("llama"))
    packed = adapted_model(**KINDS[kind], dropout=0.3).train()
    reference, micro, plain = AdapterReference(packed), micro_of(), Forward()
    before = {n: p.requires_grad for n, p in packed.named_parameters()}
    assert torch.equal(score(reference, micro, plain).logprobs, score(base, micro, plain).logprobs)
    assert not torch.equal(score(packed, micro, plain).logprobs, score(base, micro, plain).logprobs)
    ours, theirs = teacher_of(reference, micro, 90), teacher_of(base, micro, 90)
    assert torch.equal(ours.hidden, theirs.hidden) and torch.equal(ours.weight, theirs.weight)
    assert before == {n: p.requires_grad for n, p in packed.named_parameters()}
    assert all(m.training for m in packed.modules())


def test_a_reference_that_starts_from_adapters_is_their_frozen_copy(tmp_path):
    packed = adapted_model(**KINDS["body and head"])
    packed.adapters.save(tmp_path)
    start = copy.deepcopy(packed)
    again = pack_model(zoo.make("llama"))
    load_adapters(again, tmp_path)
    adapting.load_reference_adapter(again, tmp_path)
    with torch.no_grad():
        for name, x in again.named_parameters():
            if ".default." in name:  # the trained one moves on
                x.mul_(1.5)
    reference, micro, plain = AdapterReference(again), micro_of(), Forward()
    assert reference.adapter == "ref" and not any(p.requires_grad for n, p in again.named_parameters() if ".ref." in n)
    assert torch.equal(score(reference, micro, plain).logprobs, score(start, micro, plain).logprobs)
    assert not torch.equal(score(again, micro, plain).logprobs, score(start, micro, plain).logprobs)
    teacher = teacher_of(reference, micro, zoo.VOCABULARY)
    logits = (teacher.hidden @ teacher.weight.T).log_softmax(-1).gather(1, micro.batch.targets[:, None])[:, 0]
    torch.testing.assert_close(logits, score(start, micro, plain).logprobs, atol=1e-5, rtol=1e-5)
    again.adapters.save(tmp_path / "out")
    assert not (tmp_path / "out" / "ref").exists()


# -- runs --------------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    monkeypatch.setattr("fastrl.train.loop.plot_run", lambda path: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    (root / "rewards.py").write_text(REWARDS)
    made = {"model": tiny.make_model(root / "model"), "rewards": root / "rewards.py", **tiny.make_data(root / "data")}
    made["untied"] = tiny.make_model(root / "untied", tie_word_embeddings=False)
    made |= {"reward": made["dpo"], "rloo": made["grpo"], "ppo": made["grpo"], "distill": made["sft"]}
    for split, seed, count in (("train", 1, 40), ("test", 2, 10)):
        rows = tiny.sums(count, seed)
        kto = [{**r, "completion": r[("chosen", "rejected")[i % 2]], "label": not i % 2} for i, r in enumerate(rows)]
        tiny.write(root / "data" / "kto" / f"{split}.jsonl", kto, ("prompt", "completion", "label"))
        prm = [{**r, "completions": [r["chosen"], r["rejected"]], "labels": [True, False]} for r in rows]
        tiny.write(root / "data" / "prm" / f"{split}.jsonl", prm, ("prompt", "completions", "labels"))
    return {**made, "kto": root / "data" / "kto", "prm": root / "data" / "prm"}


def config_of(stage: str, place: dict, out: Path, **options):
    shared = {
        "model_name_or_path": str(place[options.pop("model", "model")]),
        "dataset_name": str(place[stage]),
        "output_dir": str(out),
        "max_steps": 3,
        "learning_rate": 3e-2,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,
        "use_peft": True,
        "lora_r": 4,
    }
    if stage in ("grpo", "rloo", "ppo"):
        shared |= {"reward_funcs": [f"{place['rewards']}:closeness"], "max_completion_length": 5}
    if stage in ("grpo", "rloo"):
        shared["num_generations"] = 4
    return CONFIGS[stage](**{**shared, **options})


def records(path: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [r[key] for r in lines if key in r]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "adapter_model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


REFERENCED = {
    "dpo": {},
    "kto": {},
    "grpo": {"beta": 0.1, "num_iterations": 2},
    "grpo, full": {"beta": 0.1, "kl_estimator": "full"},
    "rloo": {"beta": 0.1},
    "ppo": {"kl_coef": 0.1, "num_ppo_epochs": 2},
}


@pytest.mark.parametrize("case", list(REFERENCED))
def test_no_second_model_is_loaded_and_none_is_missed(case, place, tmp_path, monkeypatch):
    """The same run with a second copy of the base as its reference gives the same numbers."""
    stage, options = case.partition(",")[0], {"lora_target_modules": ["q_proj", "up_proj", "lm_head"]}
    config = config_of(stage, place, tmp_path / "one", **options, **REFERENCED[case])
    monkeypatch.setattr(workbench, "load_reference", None)  # nobody may ask for it
    one = run(config).output_dir
    with monkeypatch.context() as patch:
        patch.setattr(adapted, "start_of", lambda model: load_causal_lm(place["model"]).requires_grad_(False).eval())
        two = run(config_of(stage, place, tmp_path / "two", **options, **REFERENCED[case])).output_dir
    for key in ("loss", "grad_norm", "kl", "rewards/margins", "objective/kl"):
        assert records(one, key) == records(two, key)
    assert same(weights(one), weights(two)) and len(records(one, "loss")) == 3
    with monkeypatch.context() as patch:  # a planted mistake: the adapters stay on
        patch.setattr(adapted, "start_of", lambda model: getattr(model, "actor", model))
        odd = run(config_of(stage, place, tmp_path / "odd", **options, **REFERENCED[case])).output_dir
    assert not same(weights(one), weights(odd))


def test_what_a_run_writes_loads_everywhere(place, tmp_path):
    from transformers import AutoModelForCausalLM

    options = {"lora_target_modules": ["q_proj", "up_proj", "lm_head"], "model": "untied", "merge_adapters": True}
    out = run(config_of("sft", place, tmp_path, **options)).output_dir
    names = {p.name for p in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert not {"config.json", "model.safetensors"} & names
    assert base_of(out).path == str(place["untied"])
    ids = torch.randint(2, 19, (1, 17), generator=torch.Generator().manual_seed(0))
    ours = load_causal_lm(out).eval()
    want = ours.logprobs(ids[0], torch.tensor([0, 17], dtype=torch.int32)).logprobs[:-1]
    base = AutoModelForCausalLM.from_pretrained(place["untied"])
    for model in (
        peft.PeftModel.from_pretrained(base, out),
        peft.AutoPeftModelForCausalLM.from_pretrained(out),
        AutoModelForCausalLM.from_pretrained(out),
        AutoModelForCausalLM.from_pretrained(out / "merged"),
    ):
        logits = model.eval()(input_ids=ids).logits[0, :-1]
        got = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)
    first = peft.AutoPeftModelForCausalLM.from_pretrained(out).get_base_model().eval()
    assert not torch.allclose(first(ids).logits, AutoModelForCausalLM.from_pretrained(place["untied"])(ids).logits)


@pytest.mark.parametrize("kind", ["lora on the head", "head whole", "lora on the embedding"])
def test_tied_embeddings_are_merged_apart(kind, place, tmp_path):
    from transformers import AutoModelForCausalLM

    targets = {"lora on the head": ["q_proj", "lm_head"], "lora on the embedding": ["q_proj", "embed_tokens"]}
    options = {"target_modules": targets.get(kind, ["q_proj"])}
    if kind == "head whole":
        options["modules_to_save"] = ["lm_head"]
    packed = load_causal_lm(place["model"])
    add_adapters(packed, AdapterOptions(**options))
    stir(packed)
    packed.adapters.save(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapters(tmp_path)).eval()
    ids = torch.randint(2, 19, (1, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged(ids).logits, packed.eval().model(ids).logits, atol=2e-5, rtol=1e-5)
    assert merged.get_input_embeddings().weight.data_ptr() != merged.get_output_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", {"lora_modules_to_save": ["lm_head"]}),
        ("dpo", {"use_dora": True}),
        ("grpo", {"beta": 0.1, "num_iterations": 2}),
        ("ppo", {}),
    ],
    ids=["sft", "dpo", "grpo", "ppo"],
)
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(stage, options, place, tmp_path):
    options = options | {"max_steps": 4, "save_steps": 1}
    whole = run(config_of(stage, place, tmp_path / "whole", **options)).output_dir
    saved = whole / "checkpoint-1"
    assert not (saved / "model.safetensors").exists()
    state = load_file(saved / "training_state" / "optimizer.safetensors")
    assert state and all("lora_" in n or "modules_to_save" in n or "critic" in n for n in state)
    config = config_of(stage, place, tmp_path / "again", resume_from_checkpoint=str(saved), **options)
    again = run(config).output_dir
    assert same(weights(whole), weights(again)) and not same(weights(whole), weights(saved))
    if stage == "ppo":
        critics = [load_file(x / "value_model" / "model.safetensors") for x in (whole, again)]
        torch.testing.assert_close(*critics, atol=1e-7, rtol=1e-6)  # to the bit only with some seeds
    assert records(whole, "loss")[-1] == pytest.approx(records(again, "loss")[-1], rel=1e-6)


def test_training_goes_on_from_adapters(place, tmp_path):
    first = run(config_of("sft", place, tmp_path / "sft", lora_alpha=8)).output_dir
    went_on = {**place, "model": first}
    options = {"max_steps": 4, "save_steps": 2}
    second = run(config_of("dpo", went_on, tmp_path / "dpo", **options)).output_dir
    losses_ = records(second, "loss")
    assert losses_[0] == pytest.approx(0.6931472, abs=1e-6)  # the reference is the start, not the bare base
    assert abs(losses_[-1] - 0.6931472) > 1e-3
    assert not same(weights(first), weights(second)) and base_of(second).path == str(place["model"])
    assert json.loads((second / "adapter_config.json").read_text())["lora_alpha"] == 8
    saved = str(second / "checkpoint-2")
    again = run(config_of("dpo", went_on, tmp_path / "b", resume_from_checkpoint=saved, **options)).output_dir
    assert same(weights(second), weights(again))
    with pytest.raises(ConfigError, match="--lora_r 5: the adapters .* have 4"):
        run(config_of("dpo", went_on, tmp_path / "c", lora_r=5))
    with pytest.raises(ConfigError, match="holds adapters; add --use_peft true"):
        run(config_of("sft", went_on, tmp_path / "d", use_peft=False, lora_r=16))


@pytest.mark.parametrize("stage", ["reward", "prm"])
def test_score_heads_are_trained_whole(stage, place, tmp_path):
    out = run(config_of(stage, place, tmp_path, lora_target_modules=["all-linear"])).output_dir
    load = {"reward": load_reward_model, "prm": load_token_classifier}[stage]
    kind = {"reward": "SequenceClassification", "prm": "TokenClassification"}[stage]
    ids = torch.randint(2, 19, (13,), generator=torch.Generator().manual_seed(0))
    got = load(out).eval().values(ids, torch.tensor([0, 13], dtype=torch.int32))
    model = getattr(peft, f"AutoPeftModelFor{kind}").from_pretrained(out, num_labels=1 if stage == "reward" else 2)
    model.eval().config.pad_token_id = 0
    want = model(input_ids=ids[None]).logits.view(-1)
    torch.testing.assert_close(got[-1].view(-1) if stage == "reward" else got.view(-1), want, atol=1e-5, rtol=1e-5)
    assert any(key.endswith("score.weight") for key in weights(out))
    assert not any("lora" in key and "score" in key for key in weights(out))


def test_distillation_into_adapters(place, tmp_path):
    options = {"teacher_model_name_or_path": str(place["untied"]), "lmbda": 0.0, "max_steps": 8}
    out = run(config_of("distill", place, tmp_path, **options)).output_dir
    assert records(out, "loss")[-1] < records(out, "loss")[0]


# -- a reference that is let go ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", ["dpo", "kto"])
def test_a_precomputed_reference_is_gone(case, place, tmp_path, monkeypatch):
    seen, own = [], workbench.load_reference

    def watched(*args, **options):
        made = own(*args, **options)
        seen.extend(weakref.ref(p) for p in made.parameters())
        return made

    monkeypatch.setattr(workbench, "load_reference", watched)
    options = {"use_peft": False, "lora_r": 16, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    options |= {"loss_type": ["sigmoid"]} if case == "dpo" else {"loss_type": "bco"}
    kept = run(config_of(case, place, tmp_path / "kept", **options)).output_dir
    seen.clear()
    config = config_of(case, place, tmp_path / "gone", precompute_ref_log_probs=True, save_steps=2, **options)
    bench = workbench.build(config, Run(tmp_path, None, []))
    gc.collect()
    assert seen and not any(r() is not None for r in seen)
    assert all("ref_logprobs" in s.fields for item in [*bench.stage.items, *bench.stage.held_out] for s in item)
    del bench
    gone = run(config).output_dir
    for key in ("loss", "eval_loss", "rewards/margins"):
        assert records(gone, key) == pytest.approx(records(kept, key), rel=1e-4, abs=1e-6)
    saved = str(gone / "checkpoint-2")
    resumed = {"precompute_ref_log_probs": True, "resume_from_checkpoint": saved, "save_steps": 2}
    again = run(config_of(case, place, tmp_path / "again", **resumed, **options)).output_dir
    assert same(load_file(gone / "model.safetensors"), load_file(again / "model.safetensors"))


def test_precomputed_with_adapters(place, tmp_path):
    kept = run(config_of("dpo", place, tmp_path / "kept")).output_dir
    gone = run(config_of("dpo", place, tmp_path / "gone", precompute_ref_log_probs=True)).output_dir
    assert records(gone, "loss") == pytest.approx(records(kept, "loss"), rel=1e-5)


# -- frozen parts ------------------------------------------------------------------------------------------------------
def freeze(model) -> None:
    """The embedding and the first layer; the head too, where it is the embedding."""
    model.model.get_input_embeddings().requires_grad_(False)
    model.model.model.layers[0].requires_grad_(False)


@pytest.mark.parametrize("model", ["model", "untied"])
def test_frozen_parts_are_left_alone(model, place, tmp_path, monkeypatch):
    """Frozen with the embedding, a tied head takes the pass that makes no gradient of it."""
    packed = load_causal_lm(place[model])
    want = gradients(packed, own_loss_of(packed))
    freeze(packed)
    got = gradients(packed, own_loss_of(packed))
    assert got.keys() == {n for n, p in packed.named_parameters() if p.requires_grad} < want.keys()
    for name in got:
        torch.testing.assert_close(got[name], want[name], atol=1e-7, rtol=1e-5)

    options = {"use_peft": False, "lora_r": 16, "max_steps": 4, "save_steps": 2, "model": model}
    own = workbench.load_model

    def frozen(*args, **given):
        made = own(*args, **given)
        freeze(made)
        return made

    monkeypatch.setattr(workbench, "load_model", frozen)
    whole = run(config_of("sft", place, tmp_path / "whole", **options)).output_dir
    saved = whole / "checkpoint-2"
    state = load_file(saved / "training_state" / "optimizer.safetensors")
    assert state and not any("embed_tokens" in n or "layers.0." in n for n in state)
    again = run(config_of("sft", place, tmp_path / "again", resume_from_checkpoint=str(saved), **options)).output_dir
    before, after, resumed = (load_file(x / "model.safetensors") for x in (place[model], whole, again))
    assert same(after, resumed)
    still = {n for n in before if torch.equal(before[n], after[n])}
    assert still == {n for n in before if "embed_tokens" in n or "layers.0." in n}


def own_loss_of(packed) -> torch.Tensor:
    ids = torch.randint(2, 19, (12,), generator=torch.Generator().manual_seed(1))
    batch = TokenBatch(ids[1:], torch.ones(11, dtype=torch.bool))
    return packed.loss(losses.get("nll"), ids, torch.tensor([0, 12], dtype=torch.int32), batch, torch.arange(11)).loss


# -- flags -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_peft": False, "lora_r": 8}, "--lora_r 8 needs --use_peft true"),
        ({"use_peft": False, "lora_r": 16, "use_dora": True}, "--use_dora true needs --use_peft"),
        ({"use_peft": False, "lora_r": 16, "load_in_4bit": True}, "--load_in_4bit true needs --use_peft"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "contradict"),
        ({"use_bnb_nested_quant": True}, "needs --load_in_4bit"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_r": 0}, "lora_r"),
    ],
)
def test_flags_that_do_not_fit_are_refused(options, message, place, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_of("sft", place, tmp_path, **options)


def test_a_moving_reference_and_adapters_are_refused(place, tmp_path):
    with pytest.raises(ConfigError, match="sync_ref_model"):
        config_of("dpo", place, tmp_path, sync_ref_model=True)


@pytest.mark.parametrize(("package", "options"), [("peft", {}), ("bitsandbytes", {"load_in_4bit": True})])
def test_an_absent_package_is_named(package, options, place, tmp_path, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else own(name, *a))
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        config_of("sft", place, tmp_path, **options)


def test_the_optimizer_holds_the_adapters_alone(place, tmp_path):
    config = config_of("sft", place, tmp_path)
    bench = workbench.build(config, Run(tmp_path, None, []))
    held = {id(p) for g in build_optimizer(bench.model, config).param_groups for p in g["params"]}
    assert held == {id(p) for n, p in bench.model.named_parameters() if "lora_" in n}


# -- on ranks ----------------------------------------------------------------------------------------------------------
ON_RANKS = {
    "sft": ("sft", {"model": "untied", "lora_target_modules": ["q_proj", "down_proj", "lm_head"]}),
    "sft, tied": ("sft", {"lora_target_modules": ["q_proj", "lm_head"], "per_device_train_batch_size": 1}),
    "sft, whole": ("sft", {"lora_modules_to_save": ["lm_head"], "max_tokens_per_device": 20}),
    "dpo": ("dpo", {"use_dora": True, "per_device_train_batch_size": 3}),
    "dpo, precomputed": ("dpo", {"precompute_ref_log_probs": True, "per_device_train_batch_size": 3}),
    "dpo, from adapters": ("dpo", {"model": "adapters", "per_device_train_batch_size": 3}),
    "grpo, full": ("grpo", {"beta": 0.1, "kl_estimator": "full", "lora_target_modules": ["q_proj", "lm_head"]}),
    "reward": ("reward", {"per_device_train_batch_size": 3}),
    "sft, 4 bits": ("sft", {"load_in_4bit": True, "lora_target_modules": ["q_proj", "lm_head"]}),
}


def run_all(place: dict, out: Path) -> None:
    loop.plot_run = lambda path: None
    for name, (stage, options) in ON_RANKS.items():
        shared = {"lora_dropout": 0.0, "save_strategy": "no", "max_steps": 2}
        run(config_of(stage, place, out / name, **shared, **options))


def test_two_processes_train_the_same_adapters(place, tmp_path):
    place = {**place, "adapters": run(config_of("sft", place, tmp_path / "first")).output_dir}
    run_all(place, tmp_path / "one")
    run_ranks(2, run_all, place, tmp_path / "two")
    for name in ON_RANKS:
        one, two = (tmp_path / n / name for n in ("one", "two"))
        for key in ("loss", "grad_norm"):
            assert records(two, key) == pytest.approx(records(one, key), rel=1e-5, abs=1e-6), (name, key)
        a, b = weights(one), weights(two)
        assert a.keys() == b.keys()
        for key in a:
            # Adam's first steps are as long for a gradient near 0, whose rounding differs: 1% of what a weight moved.
            torch.testing.assert_close(b[key], a[key], rtol=1e-3, atol=6e-4)


# -- quantised bases ---------------------------------------------------------------------------------------------------
def test_what_is_asked_of_bitsandbytes():
    how = load_options(Quantisation(4, "nf4", True, "bfloat16"), torch.bfloat16, torch.device("cpu"))
    made = how["quantization_config"]
    assert made.load_in_4bit and made.bnb_4bit_quant_type == "nf4" and made.bnb_4bit_use_double_quant
    assert made.bnb_4bit_compute_dtype == torch.bfloat16 == made.bnb_4bit_quant_storage
    assert how["device_map"] == {"": "cpu"}
    eight = load_options(Quantisation(8), torch.float32, torch.device("cpu"))["quantization_config"]
    assert eight.load_in_8bit and not eight.load_in_4bit


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_over_a_quantised_base(bits, tmp_path):
    zoo.make("llama").save_pretrained(tmp_path)
    how = load_options(Quantisation(bits), torch.float32, torch.device("cpu"))
    packed = load_causal_lm(tmp_path, quantisation=how)
    add_adapters(packed, AdapterOptions(**KINDS["body and head"]))
    stir(packed)
    want = own_loss(packed.eval()).detach()  # whatever bitsandbytes would do with a model that is scored once
    assert len(quantised_parameters(packed)) == 14 and packed.packed
    assert_same_training(packed.train())
    assert torch.equal(own_loss(packed), want)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_a_quantised_base_trains(flag, place, tmp_path):
    options = {flag: True, "max_steps": 6, "save_steps": 2, "lora_target_modules": ["q_proj", "up_proj", "lm_head"]}
    config = config_of("dpo", place, tmp_path / "whole", **options)
    bench = workbench.build(config, Run(tmp_path, None, []), World())
    assert quantised_parameters(bench.model)
    for part in ("embed_tokens", "lm_head", "norm"):
        assert all(x.is_floating_point() for n, x in bench.model.named_parameters() if part in n)
    out = run(config).output_dir
    made = records(out, "loss")
    assert made[0] == pytest.approx(0.6931472, abs=1e-6) and made[-1] < made[0]
    saved = str(out / "checkpoint-2")
    again = run(config_of("dpo", place, tmp_path / "again", resume_from_checkpoint=saved, **options)).output_dir
    assert same(weights(out), weights(again))
    merge_adapters(out)
