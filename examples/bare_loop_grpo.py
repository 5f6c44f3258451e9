"""GRPO in a loop of one's own, on any transformers model: sample, score, advantages, one fused loss."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastrl
from fastrl.advantages import estimate
from fastrl.integrations import deferring

torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
grpo = fastrl.losses.get("grpo", kl_coef=0.0)
prompts, groups, length = torch.randint(1, 64, (4, 3)), 8, 6  # 4 prompts, 8 answers each
group_ids = torch.arange(4).repeat_interleave(groups)

scores = []
for _ in range(25):
    ids = model.generate(prompts.repeat_interleave(groups, 0), max_new_tokens=length, do_sample=True, top_k=0)
    rewards = (ids[:, 3:] % 2 == 0).float().mean(1)  # even tokens are wanted
    with deferring(model):  # logits[:, t] predicts ids[:, t + 1]; they are never formed
        logits = model(ids).logits[:, 2:-1]
    batch = fastrl.TokenBatch(
        targets=ids[:, 3:].reshape(-1),
        cu_seqlens=torch.arange(0, 4 * groups * length + 1, length, dtype=torch.int32),
        advantages=estimate("grpo", rewards, group_ids),
    )
    out = logits.loss(grpo, batch, outputs=("entropy",))
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    scores.append(rewards.mean().item())
print(f"reward {scores[0]:.2f} -> {scores[-1]:.2f}, entropy {out.metrics['entropy']:.2f}")
assert scores[-1] > scores[0] + 0.2
