"""A TRL trainer patched by one line: the same losses and the same logs for 20 steps, and unpatched again on demand."""

from __future__ import annotations

import copy
import functools
import json
import logging
import math
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import fastrl  # noqa: E402
from fastrl.integrations import trl as ours  # noqa: E402
from fastrl.integrations.trl import UnsupportedTrainerError, forward, head, one_pass, rows  # noqa: E402

WORDS = [f"w{i}" for i in range(61)]
SPECIAL = ("<pad>", "<eos>", "<unk>")
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
STEPS = 20
COMMON = dict(
    learning_rate=3e-3, lr_scheduler_type="constant", per_device_train_batch_size=4, max_steps=STEPS, logging_steps=1,
    use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    gradient_checkpointing=False, logging_first_step=True, seed=3,
)  # fmt: skip
ALL_DPO = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
TIMES = ("runtime", "per_second", "step_time", "total_flos")


# -- model, rows, trainers ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny models with a word-level tokenizer."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        PreTrainedTokenizerFast,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    words = [*SPECIAL, *WORDS]
    tokenizer = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    ids = dict(vocab_size=len(words), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    small = SIZES | dict(head_dim=8, max_position_embeddings=128, initializer_range=0.3)
    gpt2 = dict(n_embd=16, n_layer=1, n_head=2, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    made = {
        "qwen3": (Qwen3ForCausalLM, Qwen3Config(**ids, **small, tie_word_embeddings=False)),
        "gemma2": (Gemma2ForCausalLM, Gemma2Config(**ids, **small, final_logit_softcapping=2.0, sliding_window=8)),
        "gpt2": (GPT2LMHeadModel, GPT2Config(**ids, **gpt2, initializer_range=0.3)),
    }
    paths = {}
    for name, (kind, config) in made.items():
        torch.manual_seed(0)
        paths[name] = str(tmp_path_factory.mktemp(name))
        kind(config).save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def rows_of(kind: str, count: int = 24) -> datasets.Dataset:
    """Ragged rows of words; answers of 1 to 12 tokens."""
    make = torch.Generator().manual_seed(7)

    def text(most: int) -> str:
        n = int(torch.randint(1, most, (), generator=make))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=make))

    made = []
    for i in range(count):
        prompt = text(9)
        if kind == "SFT":
            made.append({"prompt": prompt, "completion": " " + text(12)})
        elif kind == "DPO":
            made.append({"prompt": prompt, "chosen": " " + text(12), "rejected": " " + text(12)})
        elif kind == "KTO":
            made.append({"prompt": prompt, "completion": " " + text(12), "label": bool(i % 3)})
        else:
            made.append({"prompt": prompt})
    return datasets.Dataset.from_list(made)


def share_of_low_words(completions, **columns):
    """Reward of a completion: the share of its words with a small number."""
    split = [c.split() for c in completions]
    return [sum(int(w[1:]) < 30 for w in words if w[0] == "w") / max(1, len(words)) for words in split]


def make(kind: str, path: str, out: Path, *, build=None, peft=None, count=24, **options):
    """A trainer of that kind, as a script would make it."""
    from transformers import AutoTokenizer

    if kind in ("GRPO", "RLOO"):  # large steps would make rounding decide which word is sampled
        options = dict(num_generations=4, max_completion_length=6, learning_rate=3e-4) | options
    config = getattr(trl, f"{kind}Config")(output_dir=str(out), **(COMMON | options))
    given = {"reward_funcs": share_of_low_words} if kind in ("GRPO", "RLOO") else {}
    if peft is not None:
        from peft import LoraConfig

        given["peft_config"] = LoraConfig(r=4, task_type="CAUSAL_LM", **peft)
    kind_of_trainer = getattr(trl, f"{kind}Trainer")
    made = build or (lambda cls, *a, **k: cls(*a, **k))
    tokenizer = AutoTokenizer.from_pretrained(path)
    if options.get("eval_strategy", "no") != "no":
        given["eval_dataset"] = rows_of(kind, 6)
    return made(
        kind_of_trainer, path, args=config, train_dataset=rows_of(kind, count), processing_class=tokenizer, **given
    )


def trained(trainer) -> tuple[list[float], list[dict]]:
    """(loss of every micro-batch, log of every step) of a whole run."""
    losses, original = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        made = original(*args, **kwargs)
        losses.append((made[0] if isinstance(made, tuple) else made).item())
        return made

    trainer.compute_loss = compute_loss  # its own log rounds
    trainer.train()
    return losses, trainer.state.log_history


def close(a: float, b: float, relative: float = 1e-4) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= relative * max(abs(a), abs(b)) + 2e-6 + 1e-4 * (abs(a) < 1e-2)


def check_same(theirs, mine, steps: int = STEPS) -> None:
    """The same losses and, key by key, the same logs."""
    (losses_a, logs_a), (losses_b, logs_b) = theirs, mine
    assert len(losses_a) == len(losses_b) >= steps
    for i, (a, b) in enumerate(zip(losses_a, losses_b, strict=True)):
        assert abs(a - b) <= 1e-4 * abs(a) + 1e-6, f"loss of micro-batch {i}: {a} unpatched, {b} patched"
    assert all(log["grad_norm"] > 1e-3 for log in logs_a if "grad_norm" in log)  # something was learned
    assert len(logs_a) == len(logs_b)
    for i, (a, b) in enumerate(zip(logs_a, logs_b, strict=True)):
        assert a.keys() == b.keys()
        if abs(a.get("rewards/margins", 1.0)) < 1e-5:  # policy and reference are one: which is larger is rounding
            a = a | {name: b[name] for name in a if name == "rewards/accuracies"}
        wrong = {k: (a[k], b[k]) for k in a if not any(t in k for t in TIMES) and not close(a[k], b[k])}
        assert not wrong, f"log {i}: (unpatched, patched) {wrong}"


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("transformers").setLevel(logging.ERROR)


EVALUATED = dict(eval_strategy="steps", eval_steps=10)
CASES = {
    "SFT nll": ("SFT", EVALUATED),
    "SFT dft, accumulated": ("SFT", dict(loss_type="dft", gradient_accumulation_steps=2)),
    "SFT checkpointing": ("SFT", dict(gradient_checkpointing=True, completion_only_loss=False)),
    "DPO every loss": ("DPO", dict(loss_type=ALL_DPO, label_smoothing=0.1, beta=0.3)),
    "DPO wpo, ld": (
        "DPO", dict(loss_type=["sigmoid", "ipo"], loss_weights=[1.0, 0.2], use_weighting=True, ld_alpha=0.5),
    ),
    "DPO js, precomputed": ("DPO", dict(f_divergence_type="js_divergence", precompute_ref_log_probs=True)),
    "KTO": ("KTO", EVALUATED),
    "KTO apo, precomputed": ("KTO", dict(loss_type="apo_zero_unpaired", precompute_ref_log_probs=True)),
    "GRPO dapo": ("GRPO", {}),
    "GRPO grpo, kl": ("GRPO", dict(loss_type="grpo", beta=0.1, temperature=0.7, gradient_accumulation_steps=2)),
    "GRPO grpo, quantile": ("GRPO", dict(loss_type="grpo", beta=0.1, top_entropy_quantile=0.5, entropy_coef=0.01)),
    "GRPO cispo": ("GRPO", dict(loss_type="cispo", epsilon_high=5.0, cast_lm_head_to_fp32=True)),
    "GRPO sequence, 2 iterations": (
        "GRPO", dict(importance_sampling_level="sequence", num_iterations=2, loss_type="bnpo", delta=1.5),
    ),
    "RLOO": ("RLOO", dict(beta=0.05)),
}  # fmt: skip


ONE_PASS = ("SFT", "GRPO")  # whose gradients are made in the forward
OTHERWISE = ("GRPO grpo, quantile", "GRPO sequence, 2 iterations")  # but not those of these


@pytest.mark.parametrize("name", CASES)
def test_same_losses_and_logs_for_20_steps(name, models, tmp_path, monkeypatch):
    kind, options = CASES[name]
    theirs = trained(make(kind, models["qwen3"], tmp_path / "a", **options))
    trainer = ours.patch(make(kind, models["qwen3"], tmp_path / "b", **options))
    packs = "top_entropy_quantile" not in options
    assert all((f.body is not None and f.body.works) == packs for f in trainer._fastrl)
    factors = []
    true = one_pass.common_factor
    monkeypatch.setattr(one_pass, "common_factor", lambda *args: factors.append(true(*args)) or factors[-1])
    check_same(theirs, trained(trainer))
    if kind in ONE_PASS and name not in OTHERWISE:
        assert len(factors) >= STEPS and all(f is not None for f in factors)
    else:
        assert not [f for f in factors if f is not None] or name == OTHERWISE[1]


@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
def test_other_architectures(kind, name, models, tmp_path):
    """A capped head (whose mean logit is no mean of the head), windows; absolute positions under left padding."""
    theirs = trained(make(kind, models[name], tmp_path / "a", max_steps=6))
    trainer = ours.patch(make(kind, models[name], tmp_path / "b", max_steps=6))
    assert all(f.body.works for f in trainer._fastrl), trainer._fastrl[0].body.trouble
    check_same(theirs, trained(trainer), 6)


def test_adapters_on_the_body(models, tmp_path):
    """The reference is the policy with its adapter off. Dropout draws by place, so the body stays padded."""
    for kind, dropout in (("DPO", 0.0), ("GRPO", 0.2)):
        options = dict(peft=dict(target_modules=["q_proj", "up_proj"], lora_dropout=dropout), beta=0.1, max_steps=8)
        theirs = trained(make(kind, models["qwen3"], tmp_path / f"a{kind}", **options))
        trainer = ours.patch(make(kind, models["qwen3"], tmp_path / f"b{kind}", **options))
        assert trainer._fastrl[0].draws == (dropout > 0)
        check_same(theirs, trained(trainer), 8)


def test_an_adapter_on_the_head(models, tmp_path):
    """TRL refuses it; `build` serves it: log-probs and gradients are those of the model's own logits."""
    peft = dict(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        make("DPO", models["qwen3"], tmp_path / "a", peft=peft)
    built = make("DPO", models["qwen3"], tmp_path / "b", build=ours.build, peft=peft)
    with pytest.raises(UnsupportedTrainerError, match="an adapter lies on the LM head"):
        ours.unpatch(built)
    assert built._fastrl[0].active
    with pytest.raises(UnsupportedTrainerError, match="pass the head's adapter by"):
        make("GRPO", models["qwen3"], tmp_path / "e", build=ours.build, peft=peft, cast_lm_head_to_fp32=True)
    with pytest.raises(ValueError, match="lm_head"):
        make("DPO", models["qwen3"], tmp_path / "c", peft=peft)  # the refusal is back
    trainer = make("DPO", models["qwen3"], tmp_path / "d", build=ours.build, peft=peft)
    lora = {n: p for n, p in trainer.model.named_parameters() if "lm_head.lora" in n}
    assert len(lora) == 2
    for p in lora.values():
        torch.nn.init.normal_(p, std=0.3)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    made = trainer.model(**given, labels=labels, fused_lm_head=True).log_probs
    logits = trainer.model(**given).logits[:, :-1].log_softmax(-1)
    want = logits.gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0] * (labels[:, 1:] != -100)
    torch.testing.assert_close(made, want, atol=2e-5, rtol=1e-4)
    upstream = torch.randn(made.shape)
    for mine, theirs in zip(
        *(torch.autograd.grad(x, list(lora.values()), upstream) for x in (made, want)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)
    before = {n: p.clone() for n, p in lora.items()}
    losses, _ = trained(trainer)
    assert all(math.isfinite(x) for x in losses) and all(not torch.equal(before[n], p) for n, p in lora.items())


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_reference_log_probs_made_in_advance(kind, models, tmp_path, monkeypatch):
    """TRL scores its rows while it makes the trainer: `build` is there before."""
    options = dict(precompute_ref_log_probs=True, count=8)
    theirs = make(kind, models["qwen3"], tmp_path / "a", **options).train_dataset
    scored, score = [], forward.FusedForward.score
    monkeypatch.setattr(forward.FusedForward, "score", lambda *a, **k: scored.append(1) or score(*a, **k))
    monkeypatch.setattr(datasets.Dataset, "_get_cache_file_path", lambda *args: str(tmp_path / "elsewhere.arrow"))
    mine = make(kind, models["qwen3"], tmp_path / "b", build=ours.build, **options).train_dataset
    assert scored
    for name in {"ref_logps", "ref_KL_logps", "ref_chosen_logps", "ref_rejected_logps"} & set(theirs.column_names):
        torch.testing.assert_close(torch.tensor(mine[name]), torch.tensor(theirs[name]), atol=1e-5, rtol=1e-5)


def test_a_saved_head_beside_adapters(models, tmp_path):
    options = dict(peft=dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), max_steps=6)
    theirs = trained(make("KTO", models["qwen3"], tmp_path / "a", **options))
    check_same(theirs, trained(ours.patch(make("KTO", models["qwen3"], tmp_path / "b", **options))), 6)


def test_in_bfloat16(models, tmp_path):
    """Accelerate runs policy and reference under autocast, the reference in a forward that it wrapped before."""
    options = dict(bf16=True, max_steps=4)
    theirs = trained(make("DPO", models["qwen3"], tmp_path / "a", **options))
    trainer = ours.patch(make("DPO", models["qwen3"], tmp_path / "b", **options))
    seen = []
    reference = trainer.ref_model.get_input_embeddings()
    norm = next(m for n, m in trainer.ref_model.named_modules() if n.endswith("q_proj"))
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    mine = trained(trainer)
    assert reference is not None and seen and set(seen) == {torch.bfloat16}
    for a, b in zip(theirs[0], mine[0], strict=True):
        assert abs(a - b) <= 2e-2 * abs(a)


def test_unpatched_is_as_before(models, tmp_path):
    for kind in ("GRPO", "DPO"):
        options = dict(max_steps=5)
        theirs = trained(make(kind, models["qwen3"], tmp_path / f"a{kind}", **options))
        trainer = make(kind, models["qwen3"], tmp_path / f"b{kind}", **options)
        before, attributes = trainer.model.forward, set(vars(trainer))
        attention = trainer.model.config._attn_implementation
        assert ours.patch(ours.patch(trainer)) is trainer and trainer.model.forward != before
        assert trainer.model.config._attn_implementation != attention
        assert ours.unpatch(trainer) is trainer and trainer.model.forward == before
        assert trainer.model.config._attn_implementation == attention and set(vars(trainer)) == attributes
        assert trained(trainer)[0] == theirs[0]
    assert ours.unpatch(trainer) is trainer


def test_unpatched_after_training(models, tmp_path):
    """Accelerate wraps a forward when training starts: taken away later, ours hands over to TRL's."""
    trainer = ours.patch(make("SFT", models["qwen3"], tmp_path, bf16=True, max_steps=2))
    trained(trainer)
    ours.unpatch(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    made = trainer.model(**batch, fused_lm_head=True)
    assert made.log_probs.shape == (3, batch["labels"].shape[1] - 1) and "_fastrl" not in vars(trainer)


def test_a_loss_of_ones_own_comes_back(models, tmp_path):
    """The trainer's own _compute_loss is covered, not lost; patched again, it is covered once."""
    trainer = make("GRPO", models["qwen3"], tmp_path)
    own = trainer._compute_loss = functools.partial(type(trainer)._compute_loss, trainer)
    ours.patch(ours.patch(trainer))
    assert trainer._compute_loss is not own and trainer._fastrl[0].uncovered is own
    assert ours.unpatch(trainer)._compute_loss is own


def test_a_copy_of_a_patched_model_is_itself(models, tmp_path):
    trainer = ours.patch(make("SFT", models["qwen3"], tmp_path))
    other, words = copy.deepcopy(trainer.model), torch.arange(3, 9)[None]
    with torch.no_grad():
        before = other(words, labels=words, fused_lm_head=True).log_probs
        for p in trainer.model.parameters():
            p.mul_(0.5)
        after, moved = (m(words, labels=words, fused_lm_head=True).log_probs for m in (other, trainer.model))
    assert torch.equal(before, after) and not torch.allclose(after, moved)


def test_a_second_trainer_on_the_same_model(models, tmp_path):
    """It finds packed attention and packs too; once the first is unpatched, it stays padded."""
    first = ours.patch(make("SFT", models["qwen3"], tmp_path))
    second = make("SFT", models["qwen3"], tmp_path)
    second.model = first.model
    ours.patch(second)
    assert second._fastrl[0].body.ready
    ours.unpatch(first)
    assert second.model.config._attn_implementation == "sdpa" and not second._fastrl[0].body.ready
    ours.unpatch(second)
    assert second.model.config._attn_implementation == "sdpa"


def test_rows_stay_padded_where_packing_would_change_results(models, tmp_path):
    options = dict(neftune_noise_alpha=5.0, max_steps=4)
    theirs = trained(make("SFT", models["qwen3"], tmp_path / "a", **options))
    trainer = make("SFT", models["qwen3"], tmp_path / "b", **options)
    with pytest.raises(UnsupportedTrainerError, match="pack=True, but NEFTune"):
        ours.patch(trainer, pack=True)
    assert ours.patch(trainer)._fastrl[0].body is None
    check_same(theirs, trained(trainer), 4)
    trainer = make("GRPO", models["qwen3"], tmp_path / "c")
    trainer.use_transformers_continuous_batching = True
    with pytest.raises(UnsupportedTrainerError, match="pack=True, but continuous batching"):
        ours.patch(trainer, pack=True)
    assert ours.patch(trainer)._fastrl[0].body is None
    assert trainer.model.config._attn_implementation == "sdpa"


def test_a_plain_call_in_training_is_named_once(models, tmp_path):
    trainer = ours.patch(make("SFT", models["qwen3"], tmp_path))
    words = torch.arange(3, 9)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            trainer.model.train()(words)
        trainer.model.eval()(words)
    with pytest.warns(UserWarning, match="Qwen3ForCausalLM was called in training without fused_lm_head=True"):
        trainer.model.train()(words)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.model(words)


@pytest.mark.slow
def test_two_ranks(models, tmp_path):
    """Under DDP, which wraps the patched model when training starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", __file__]
    done = subprocess.run([*launch, models["qwen3"], str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads((tmp_path / "losses.json").read_text())
    assert made["wrapped"] == "DistributedDataParallel"
    for theirs, mine in made["losses"]:
        assert len(theirs) == 4
        for a, b in zip(theirs, mine, strict=True):
            assert close(a, b, 1e-4)


def one_rank(path: str, out: str) -> None:
    losses = []
    for kind in ("SFT", "DPO", "GRPO"):
        theirs = make(kind, path, Path(out) / "a", max_steps=4)
        losses.append([trained(theirs)[0]])
        mine = ours.patch(make(kind, path, Path(out) / "b", max_steps=4))
        losses[-1].append(trained(mine)[0])
    if mine.accelerator.is_main_process:
        record = {"losses": losses, "wrapped": type(mine.model_wrapped).__name__}
        (Path(out) / "losses.json").write_text(json.dumps(record))


def test_a_body_that_cannot_read_packed_rows_says_so(models, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_difference", lambda body: "they differ")
    trainer = make("SFT", models["qwen3"], tmp_path)
    with pytest.raises(ValueError, match="pack=True, but Qwen3ForCausalLM.*they differ"):
        ours.patch(trainer, pack=True)
    with pytest.warns(UserWarning, match="they differ; its body goes on reading padded"):
        ours.patch(trainer)
    assert trainer.model.config._attn_implementation == "sdpa"
    assert math.isfinite(trained(trainer)[0][-1])


def test_no_logits_are_formed(models, tmp_path):
    """Neither [B, L, V] nor [scored rows, V] exists at once under a small workspace."""
    from oracle import Watch

    trainer = make("SFT", models["qwen3"], tmp_path, per_device_train_batch_size=16)
    ours.patch(trainer, workspace_bytes=4096)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(16)])
    scored = int((batch["labels"] != -100).sum())
    with Watch() as watch:
        trainer.compute_loss(trainer.model, batch).backward()
    assert watch.largest < scored * (len(WORDS) + len(SPECIAL))


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_refusals_name_what_is_wrong(models, tmp_path):
    with pytest.raises(TypeError, match="SFTTrainer, DPOTrainer"):
        ours.patch(object())
    trainer = make("SFT", models["qwen3"], tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(UnsupportedTrainerError, match="label_smoothing_factor"):
        ours.patch(trainer)
    for name, value, named in (
        ("_is_vlm", True, "images"),
        ("aux_loss_enabled", True, "router_aux_loss_coef"),
        ("compute_loss_func", len, "compute_loss_func"),
        ("is_deepspeed_enabled", True, "DeepSpeed"),
        ("is_fsdp_enabled", True, "FSDP"),
    ):
        trainer = make("SFT", models["qwen3"], tmp_path)
        setattr(trainer, name, value)
        with pytest.raises(UnsupportedTrainerError, match=named):
            ours.patch(trainer)
        assert "_fastrl" not in vars(trainer)
    for option in ("use_liger_kernel", "torch_compile"):
        setattr(trainer.args, option, True)
        with pytest.raises(UnsupportedTrainerError, match=f"{option}=True.*FSDP"):
            ours.patch(trainer)


def test_a_head_that_does_more_than_its_config_says(models, tmp_path):
    trainer = make("SFT", models["gemma2"], tmp_path)
    own = trainer.model.config.final_logit_softcapping
    trainer.model.config.final_logit_softcapping = None
    theirs = vars(trainer.model)["forward"]
    trainer.model.forward = lambda *a, **k: twice(type(trainer.model).forward(trainer.model, *a, **k))
    with pytest.raises(ValueError, match="its config says"):
        ours.patch(trainer)
    trainer.model.config.final_logit_softcapping, trainer.model.forward = own, theirs
    ours.patch(trainer)


def twice(output):
    output.logits = output.logits * 2.0
    return output


# -- the guess at the loss ---------------------------------------------------------------------------------------------
def test_a_loss_that_was_not_expected_is_differentiated_as_it_comes():
    """Whatever comes back for the log-probs: expected up to a factor, or not at all."""
    make = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    h, w, b = (x.requires_grad_() for x in (draw(9, 5), draw(17, 5), draw(17)))
    targets = torch.randint(17, (9,), generator=make)
    guess = one_pass.Guess(one_pass.Expected(), draw(9), draw(9), draw(9).abs())
    form = one_pass.LinearForm(h, w, b)
    truth = torch.nn.functional.linear(h, w, b).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    back = guess.ref_logprobs - truth.detach()
    expected = guess.c + guess.kl_weight * (1 - back.exp())
    for upstream, taken in (
        (expected, 1),
        (-0.3 * expected, 1),
        (0 * expected, 1),
        (draw(9), 0),
        (expected * (1 + 1e-3 * draw(9)), 0),
    ):
        made = one_pass.one_pass(form, targets, guess, {"outputs": ("logprobs", "entropy")}).logprobs
        torch.testing.assert_close(made, truth)
        assert (one_pass.common_factor(upstream, expected) is not None) == bool(taken)
        mine = torch.autograd.grad(made, (h, w, b), upstream)
        theirs = torch.autograd.grad(truth, (h, w, b), upstream, retain_graph=True)
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y)


def test_an_entropy_beside_a_guess_has_its_gradient():
    h, w = torch.randn(9, 5, dtype=torch.float64, requires_grad=True), torch.randn(17, 5, dtype=torch.float64)
    targets, c = torch.arange(9), torch.randn(9, dtype=torch.float64)
    z = torch.nn.functional.linear(h, w).log_softmax(-1)
    truth = {"logprobs": z.gather(1, targets[:, None])[:, 0], "entropy": -(z * z.exp()).sum(-1)}
    for names in (("entropy",), ("logprobs", "entropy")):
        guess = one_pass.Guess(one_pass.Expected(), c)
        form = one_pass.LinearForm(h, w, None)
        made = one_pass.one_pass(form, targets, guess, {"outputs": ("logprobs", "entropy")})
        mine = sum((c * getattr(made, n)).sum() for n in names)
        theirs = sum((c * truth[n]).sum() for n in names)
        want = torch.autograd.grad(theirs, h, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(mine, h)[0], want)
        assert guess.misses == [" and ".join(names)]


def test_a_wrong_guess_is_made_twice(models, tmp_path, monkeypatch):
    trainer = make("SFT", models["qwen3"], tmp_path, max_steps=5)
    calls = []

    def squared(model, inputs, *args, **kwargs):
        return (model(**inputs, fused_lm_head=True).log_probs ** 2).sum() / 9

    trainer.compute_loss = squared
    ours.patch(trainer)
    true = head.one_pass
    monkeypatch.setattr(head, "one_pass", lambda *args: calls.append(1) or true(*args))
    trainer.train()
    assert len(calls) == 2 == len(trainer._fastrl[0].misses)


def test_a_loss_that_has_no_part_in_it_gives_none():
    """Its gradients are there already, but nothing is walked over to multiply them by 0."""
    h, w = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    batch = fastrl.TokenBatch(targets=torch.arange(4))
    loss = fastrl.fused_loss(fastrl.losses.get("nll"), h, w, batch, backend="torch").loss

    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, upstream):
            return None

    assert torch.autograd.grad(Cut.apply(loss), (h, w), allow_unused=True) == (None, None)


# -- planted mistakes --------------------------------------------------------------------------------------------------
MUTANTS = {
    "rows off by one": ("DPO", forward.FusedForward, "hidden", lambda f: lambda s, a, k, at: f(s, a, k, (at + 1))),
    "positions from 0": ("GRPO gpt2", rows.RealTokens, "columns", lambda f: property(lambda s: s.packing.position_ids)),
    "temperature forgotten": ("GRPO", head, "linear_logprobs", lambda f: lambda *a, temperature, **k: f(*a, **k)),
    "mean logit halved": ("DPO", head, "mean_logits", lambda f: lambda *a: f(*a) / 2),
    "gradient turned round": ("SFT", one_pass, "common_factor", lambda f: lambda *a: -f(*a)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_mistakes_turn_red(name, models, tmp_path, monkeypatch):
    what, owner, attribute, change = MUTANTS[name]
    kind, _, model = what.partition(" ")
    options = dict(max_steps=4) | (dict(temperature=0.5, num_iterations=2) if kind == "GRPO" and not model else {})
    path = models[model or "qwen3"]
    theirs = trained(make(kind, path, tmp_path / "a", **options))
    monkeypatch.setattr(owner, attribute, change(getattr(owner, attribute)))
    trainer = make(kind, path, tmp_path / "b", **options)
    with pytest.raises((AssertionError, ValueError)):
        check_same(theirs, trained(ours.patch(trainer, pack=True)), 4)


if __name__ == "__main__":
    one_rank(*sys.argv[1:])
