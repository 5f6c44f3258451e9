"""Supervised fine-tuning in a loop of one's own: hidden states and the head's weight, packed, without logits."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastrl
from fastrl.models import next_tokens, pack_model

torch.manual_seed(0)
sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
model = pack_model(LlamaForCausalLM(LlamaConfig(**sizes)))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
nll = fastrl.losses.get("nll")

lengths = [5, 17, 9, 30]  # four sequences end to end, no padding
ids = torch.cat([torch.arange(n) * 7 % 512 for n in lengths])
cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
batch = fastrl.TokenBatch(targets=next_tokens(ids, cu_seqlens), cu_seqlens=cu_seqlens)  # -100 in the last rows
losses = []
for _ in range(30):
    out = model.loss(nll, ids, cu_seqlens, batch, outputs=("is_argmax",))
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(out.loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, accuracy {out.metrics['mean_token_accuracy']:.2f}")
assert losses[-1] < losses[0] / 2
