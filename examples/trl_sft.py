"""TRL's SFTTrainer with fastrl's head: one line, the same losses and logs."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fastrl.integrations.trl

words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None))

rows = Dataset.from_list(
    [{"prompt": f"w{i} w{i + 1}", "completion": f" w{i + 2} w{i + 3} w{i + 4}"} for i in range(48)]
)
quiet = dict(output_dir="out", report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False)
config = SFTConfig(max_steps=40, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, **quiet)
trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
fastrl.integrations.trl.patch(trainer)  # the one line
trainer.train()

losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < losses[0] / 2
