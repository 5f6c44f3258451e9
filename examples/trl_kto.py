"""TRL's KTOTrainer with fastrl's head, policy and reference alike: one line, the same losses and logs."""

import copy

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import KTOConfig, KTOTrainer

import fastrl.integrations.trl

words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None))

rows = [{"prompt": f"w{i}", "completion": f" w{i + 1} w{i + 2}", "label": i % 2 == 0} for i in range(48)]
quiet = dict(output_dir="out", report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False)
config = KTOConfig(max_steps=30, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=1, **quiet)
given = dict(ref_model=copy.deepcopy(model), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
trainer = KTOTrainer(model, args=config, **given)
fastrl.integrations.trl.patch(trainer)  # the one line
trainer.train()

logs = [log for log in trainer.state.log_history if "rewards/margins" in log]
print(f"margin {logs[0]['rewards/margins']:.3f} -> {logs[-1]['rewards/margins']:.3f}")
assert logs[-1]["rewards/margins"] > logs[0]["rewards/margins"] + 0.1
