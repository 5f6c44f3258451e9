"""TRL's RLOOTrainer with fastrl's head: one line, the same losses and logs."""

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import RLOOConfig, RLOOTrainer

import fastrl.integrations.trl

words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))]
tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0, eos_token_id=1, bos_token_id=None))


def even(completions, **columns):
    """Share of words with an even number."""
    return [sum(word in words[3::2] for word in text.split()) / 6 for text in completions]


rows = Dataset.from_list([{"prompt": f"w{i} w{i + 1}"} for i in range(32)])
quiet = dict(output_dir="out", report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, bf16=False)
sampling = dict(num_generations=8, max_completion_length=6, beta=0.0)
config = RLOOConfig(
    max_steps=30, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=1, **sampling, **quiet
)
trainer = RLOOTrainer(model, reward_funcs=even, args=config, train_dataset=rows, processing_class=tokenizer)
fastrl.integrations.trl.patch(trainer)  # the one line
trainer.train()

rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
print(f"reward {rewards[0]:.2f} -> {rewards[-1]:.2f}")
assert rewards[-1] > rewards[0] + 0.1
