"""Tiny random models of every family, as transformers makes and saves them; every tensor matters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 75
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 48, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 48, "resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_FALCON = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 60,
    "max_position_embeddings": 48, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_NEOX = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 60,
    "max_position_embeddings": 48, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 4, "ffn_dim": 60,
    "num_attention_heads": 4, "max_position_embeddings": 48, "dropout": 0.0, "bos_token_id": 2, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

# Name -> (model_type, keys of its config).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "neox": ("gpt_neox", {**_NEOX, "rotary_pct": 0.5}),
    "neox-20b": ("gpt_neox", {**_NEOX, "hidden_act": "gelu_new", "use_parallel_residual": False, "rotary_pct": 1.0}),
    "neox-polyglot": ("gpt_neox", {**_NEOX, "attention_bias": False, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-odd": ("gpt2", {**_GPT2, "n_inner": 52, "activation_function": "relu", "tie_word_embeddings": False}),
    "gptj": ("gptj", {**_GPT2, "rotary_dim": 4}),
    "starcoder": ("gpt_bigcode", {**_GPT2, "multi_query": True}),
    "bigcode-multi-head": ("gpt_bigcode", {**_GPT2, "multi_query": False, "activation_function": "gelu"}),
    "llama-1": ("llama", {**_LLAMA, "num_key_value_heads": 4}),
    "llama-2": ("llama", _LLAMA),
    "llama-3": ("llama", {**_LLAMA, "rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    "llama-yarn": (
        "llama",
        {
            **_LLAMA,
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 500.0, "factor": 3.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "codellama": ("llama", {**_LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0}}),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 5}),
    "mistral-0.3": ("mistral", {**_LLAMA, "sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("qwen3", {**_LLAMA, "head_dim": 12}),
    "gemma": ("gemma", {**_LLAMA, "head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "falcon-7b": ("falcon", _FALCON),
    "falcon-40b": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": (
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1, "bias": True},
    ),
    "falcon-sequential": ("falcon", {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "opt": ("opt", _OPT),
    "opt-no-bias": ("opt", {**_OPT, "enable_bias": False, "activation_function": "gelu"}),
}  # fmt: skip


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32, *, shard_size: str = "40KB") -> Any:
    """Save the model to the folder, in several files, and return it in fp32 and in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, keys = MODELS[name]
    config = AutoConfig.for_model(model_type, **keys)
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((parameter + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise).to(dtype))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return model.float()
