"""One tiny random model of each architecture that the tests name, made in milliseconds."""

from __future__ import annotations

import torch
import transformers

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"head_dim": 8, "sliding_window": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# name -> (prefix of the config, class of the model, what differs from SIZES)
DENSE = {
    "llama": ("Llama", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", WINDOW),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", WINDOW | {"final_logit_softcapping": 20.0}),
    "mistral": ("Mistral", "MistralForCausalLM", WINDOW),
    "phi3": ("Phi3", "Phi3ForCausalLM", {}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "cohere": ("Cohere", "CohereForCausalLM", {"logit_scale": 0.25}),
    "granite": ("Granite", "GraniteForCausalLM", {"logits_scaling": 3.0}),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", {}),
    "phi": ("Phi", "PhiForCausalLM", {}),  # a bias in the head
}
OTHERS = {
    "gpt_oss": ("GptOss", "GptOssForCausalLM", WINDOW | EXPERTS),  # attention sinks
    "llama4": ("Llama4Text", "Llama4ForCausalLM", {"head_dim": 8, "attention_chunk_size": 8, "num_hidden_layers": 4}),
    "minicpm3": ("MiniCPM3", "MiniCPM3ForCausalLM", {"num_key_value_heads": 4}),  # the head's input is scaled
}
STATEFUL = {
    "mamba": ("Mamba", "MambaForCausalLM", {"state_size": 4}),
    "lfm2": ("Lfm2", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}),
    "recurrent_gemma": ("RecurrentGemma", "RecurrentGemmaForCausalLM", {"num_hidden_layers": 3, "lru_width": 32}),
}
EXTRA = {
    "llama4": {"intermediate_size_mlp": 64, "num_local_experts": 2},
    "minicpm3": {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}
ALL = DENSE | OTHERS | STATEFUL


def make(name: str, dtype: torch.dtype = torch.float32, **overrides):
    """A plain transformers model in eval mode. Weights are large enough for attention, caps and scales to matter."""
    prefix, cls, own = ALL[name]
    sizes = {"vocab_size": VOCABULARY} if name == "gpt2" else SIZES
    config = getattr(transformers, f"{prefix}Config")(**{**sizes, **own, **EXTRA.get(name, {}), **overrides})
    torch.manual_seed(0)
    model = getattr(transformers, cls)(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model.to(dtype).eval()


def documents(lengths: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def boundaries(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([0, *(len(p) for p in parts)]).cumsum(0).to(torch.int32)
