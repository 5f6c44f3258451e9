"""transformers' Trainer with a loss that never forms logits: one line, the patch."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from fastrl.integrations.transformers import patch

torch.manual_seed(0)
sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16)
model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2))
patch(model)

ids = torch.arange(32) * 7 % 512
rows = [{"input_ids": ids.roll(i), "labels": ids.roll(i)} for i in range(64)]
options = dict(max_steps=20, per_device_train_batch_size=8, learning_rate=3e-3, use_cpu=True)
arguments = TrainingArguments("outputs/example", report_to="none", save_strategy="no", **options)
trainer = Trainer(model, arguments, train_dataset=rows)
before = trainer.evaluate(rows)["eval_loss"]
trainer.train()
after = trainer.evaluate(rows)["eval_loss"]
print(f"loss {before:.2f} -> {after:.2f}")
assert after < before / 2
