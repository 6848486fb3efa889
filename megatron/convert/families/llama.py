"""Llama (1, 2, 3, CodeLlama), Mistral, Qwen2 and 2.5, Qwen3, Gemma: rmsnorm, gated units, projections apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from megatron.common.errors import CheckpointError
from megatron.convert.family import EMBEDDING, Family, Values, pair, rope_keys, separate_projections
from megatron.convert.recipes import SAME, Group
from megatron.model.spec import ModelSpec

_ACTIVATIONS = {
    **{"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"},
    **{"gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"},
}
_NAMES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "geglu_tanh": "gelu_pytorch_tanh"}
_BUFFERS = (".rotary_emb.inv_freq",)


def _base(values: Values, *, head_dim: int | None = None, **changes: Any) -> ModelSpec:
    hidden, heads = values.get("hidden_size", 4096), values.get("num_attention_heads", 32)
    vocab, bias = values.get("vocab_size", 32000), values.get("attention_bias", False)
    width = values.get("head_dim", head_dim or hidden // heads)
    base: dict[str, Any] = {
        "num_layers": values.get("num_hidden_layers", 32),
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": values.get("num_key_value_heads", heads),
        "ffn_size": values.get("intermediate_size", 11008),
        "vocab_size": vocab,
        "padded_vocab_size": vocab,
        "max_positions": values.get("max_position_embeddings", 2048),
        "head_dim": width,
        "norm": "rmsnorm",
        "norm_eps": values.get("rms_norm_eps", 1e-6),
        "position": "rotary",
        "rotary_dims": width,
        **values.rope(),
        "attention_bias": bias,
        "mlp_bias": False,
        "tied_head": values.get("tie_word_embeddings", False),
        "attention_dropout": values.get("attention_dropout", 0.0),
        "init_std": values.get("initializer_range", 0.02),
        **changes,
    }
    if "activation" not in base:
        base["activation"] = values.choice("hidden_act", "silu", _ACTIVATIONS)
    return ModelSpec(**base)


def _read_llama(config: Mapping[str, Any]) -> ModelSpec:
    values = Values(config, "Llama")
    return _base(values, mlp_bias=values.get("mlp_bias", False))


def _read_mistral(config: Mapping[str, Any]) -> ModelSpec:
    defaults = {
        "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
    }  # fmt: skip
    values = Values({**defaults, **config, "attention_bias": False}, "Mistral")
    return _base(values, **_window(values, True))


def _read_qwen2(config: Mapping[str, Any]) -> ModelSpec:
    values = Values({**_QWEN_DEFAULTS, **config, "attention_bias": False}, "Qwen2")
    return _base(values, qkv_bias=True, **_window(values, values.get("use_sliding_window", False)))


def _read_qwen3(config: Mapping[str, Any]) -> ModelSpec:
    values = Values({**_QWEN_DEFAULTS, **config}, "Qwen3")
    window = _window(values, values.get("use_sliding_window", False))
    return _base(values, head_dim=128, qk_norm=True, **window)


_QWEN_DEFAULTS = {
    "vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768, "sliding_window": 4096,
    "num_key_value_heads": 32,
}  # fmt: skip


def _read_gemma(config: Mapping[str, Any]) -> ModelSpec:
    defaults = {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }  # fmt: skip
    values = Values({**defaults, **config}, "Gemma")
    values.need("use_bidirectional_attention", False)
    # Gemma's first config.json said gelu and meant its tanh form; transformers reads it so.
    names = {**_ACTIVATIONS, "gelu": "geglu_tanh"}
    key = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    return _base(
        values,
        head_dim=256,
        norm_offset=True,
        activation=values.choice(key, "gelu_pytorch_tanh", names),
        embedding_scale=math.sqrt(values.get("hidden_size")),
    )


def _window(values: Values, is_used: bool) -> dict[str, Any]:
    """transformers' sliding_window counts the token itself, ours only those before it."""
    width, layers = values.config.get("sliding_window"), values.get("num_hidden_layers", 32)
    if not is_used or width is None:
        return {}
    types = values.get("layer_types")
    if types is None:
        first = 0 if values.name == "Mistral" else values.get("max_window_layers", 28)
        types = ["sliding_attention" if index >= first else "full_attention" for index in range(layers)]
    if foreign := set(types) - {"sliding_attention", "full_attention"}:
        raise CheckpointError(f"config.json has layers of type {sorted(foreign)[0]!r}, which are not known here")
    chosen = tuple(index for index, kind in enumerate(types) if kind == "sliding_attention")
    return {"window": width - 1, "window_layers": chosen} if chosen else {}


def _common(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.ffn_size,
        "hidden_act": _NAMES.get(spec.activation, spec.activation),
        "max_position_embeddings": spec.max_positions,
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": spec.attention_bias,
        "attention_dropout": spec.attention_dropout,
        "initializer_range": spec.init_std,
        **rope_keys(spec),
    }


def _write_llama(spec: ModelSpec) -> dict[str, Any]:
    return {**_common(spec), "mlp_bias": spec.mlp_bias, "pretraining_tp": 1}


def _write_mistral(spec: ModelSpec) -> dict[str, Any]:
    keys = {**_common(spec), "sliding_window": None if spec.window is None else spec.window + 1}
    del keys["attention_bias"]
    return keys


def _write_qwen(spec: ModelSpec) -> dict[str, Any]:
    keys = _common(spec)
    layers = [spec.layer_window(index) is not None for index in range(spec.num_layers)]
    return {
        **keys,
        "use_sliding_window": any(layers),
        "sliding_window": None if spec.window is None else spec.window + 1,
        "max_window_layers": layers.index(True) if any(layers) else spec.num_layers,
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in layers],
    }


def _write_gemma(spec: ModelSpec) -> dict[str, Any]:
    keys = _common(spec)
    return {**keys, "hidden_activation": keys["hidden_act"]}


def _groups(spec: ModelSpec) -> list[Group]:
    groups = [Group(("model.embed_tokens.weight",), (EMBEDDING,), SAME)]
    for index in range(spec.num_layers):
        theirs, ours = f"model.layers.{index}", f"layers.{index}"
        groups += pair(f"{theirs}.input_layernorm", f"{ours}.input_layernorm", bias=False)
        groups += separate_projections(spec, f"{theirs}.self_attn", f"{ours}.attention")
        if spec.qk_norm:
            groups += pair(f"{theirs}.self_attn.q_norm", f"{ours}.attention.query_norm", bias=False)
            groups += pair(f"{theirs}.self_attn.k_norm", f"{ours}.attention.key_norm", bias=False)
        groups += pair(f"{theirs}.self_attn.o_proj", f"{ours}.attention.dense", bias=spec.attention_bias)
        groups += pair(f"{theirs}.post_attention_layernorm", f"{ours}.post_attention_layernorm", bias=False)
        for their, own in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "linear2")):
            groups += pair(f"{theirs}.mlp.{their}", f"{ours}.mlp.{own}", bias=spec.mlp_bias)
    return [*groups, *pair("model.norm", "final_norm", bias=False)]


def _family(
    model_type: str,
    name: str,
    read: Callable[[Mapping[str, Any]], ModelSpec],
    write: Callable[[ModelSpec], dict[str, Any]],
) -> Family:
    return Family(model_type, f"{name}ForCausalLM", read, write, _groups, "model.", _BUFFERS)


LLAMA = _family("llama", "Llama", _read_llama, _write_llama)
MISTRAL = _family("mistral", "Mistral", _read_mistral, _write_mistral)
QWEN2 = _family("qwen2", "Qwen2", _read_qwen2, _write_qwen)
QWEN3 = _family("qwen3", "Qwen3", _read_qwen3, _write_qwen)
GEMMA = _family("gemma", "Gemma", _read_gemma, _write_gemma)
