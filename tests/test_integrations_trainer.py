"""transformers' own Trainer, on a patched model against an unpatched one: the same losses, step by step."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from transformers import Trainer, TrainerCallback, TrainingArguments

from fastrl.integrations.transformers import patch
from fastrl.models import UnsupportedModelError

STEPS = 5


def rows(count: int = 24) -> list[dict]:
    """Ragged answers after a masked prompt, padded on the right to one length."""
    made = []
    for seed in range(count):
        length = 6 + seed % 9
        ids = torch.zeros(15, dtype=torch.long)
        ids[:length] = zoo.documents((length,), seed)[0]
        mask = (torch.arange(15) < length).long()
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
        made[-1]["labels"][: 2 + seed % 3] = -100
    return made


class Losses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += [logs["loss"]] if "loss" in logs else []


def train(model, path, trainer=Trainer, **options) -> tuple[list[float], Trainer]:
    common = {"max_steps": STEPS, "per_device_train_batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1}
    common |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3}
    made = trainer(model, TrainingArguments(str(path), **common | options), train_dataset=rows(), eval_dataset=rows(4))
    made.add_callback(log := Losses())
    made.train()
    return log.seen, made


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("gemma2", {"gradient_accumulation_steps": 4}),
        ("qwen3", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        ("cohere", {"average_tokens_across_devices": False, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
    ],
    ids=["plain", "accumulation", "checkpointing", "clipped"],
)
def test_losses_are_those_of_the_unpatched_model(name, options, tmp_path):
    plain = zoo.make(name)
    mine = patch(copy.deepcopy(plain))
    want, _ = train(plain, tmp_path / "plain", **options)
    got, _ = train(mine, tmp_path / "mine", **options)
    assert len(got) == STEPS and want[-1] != want[0]
    torch.testing.assert_close(got, want, atol=0, rtol=1e-4)
    for ours, theirs in zip(mine.parameters(), plain.parameters(), strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()


def test_mixed_precision(tmp_path):
    plain = zoo.make("qwen3")
    want, _ = train(copy.deepcopy(plain), tmp_path / "plain", bf16=True)
    got, _ = train(patch(copy.deepcopy(plain)), tmp_path / "mine", bf16=True)
    torch.testing.assert_close(got, want, atol=0, rtol=1e-2)


def test_evaluation_loss(tmp_path):
    plain = zoo.make("llama")
    _, theirs = train(copy.deepcopy(plain), tmp_path / "plain")
    _, ours = train(patch(copy.deepcopy(plain)), tmp_path / "mine")
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-4)


def test_label_smoothing_belongs_to_the_patch(tmp_path):
    """The Trainer's own takes the labels away from the model: exact still, by logits. The patch does it without."""
    plain = zoo.make("llama")
    want, _ = train(copy.deepcopy(plain), tmp_path / "plain", label_smoothing_factor=0.2)
    for factor, model in ((0.0, patch(copy.deepcopy(plain), label_smoothing=0.2)), (0.2, patch(copy.deepcopy(plain)))):
        got, _ = train(model, tmp_path / str(factor), label_smoothing_factor=factor)
        torch.testing.assert_close(got, want, atol=0, rtol=1e-4)


def test_metrics_of_logits_say_what_to_do(tmp_path):
    class Accuracy(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
            outputs.logits.argmax(-1)
            return (loss, outputs) if return_outputs else loss

    model = zoo.make("llama")
    with pytest.raises(AttributeError, match="attribute 'argmax' of logits .* were not formed"):
        train(patch(copy.deepcopy(model)), tmp_path / "touched", Accuracy)
    for only_training in (False, True):
        mine = patch(copy.deepcopy(model), only_training=only_training)
        options = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True)
        trainer = Trainer(mine, options, eval_dataset=rows(4), compute_metrics=lambda p: {"shape": p.predictions.shape})
        if only_training:
            assert trainer.evaluate()["eval_shape"] == (4, 15, zoo.VOCABULARY)
        else:
            with pytest.raises((AttributeError, TypeError, UnsupportedModelError), match="DeferredLogits|not formed"):
                trainer.evaluate()
