"""GPT-NeoX in Hugging Face's terms: names, and config.json to and from a ModelSpec.

Only plain values here; no file, no transformers. Invariant: `spec_from_config(config_json(spec))` describes the same
function, and every tensor keeps its shape and its values (rows of padding apart).
Source: names and config keys as read by transformers 4.38 to 5.x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron.common.errors import CheckpointError
from megatron.model.spec import ModelSpec, Residual

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "head.weight"
VOCABULARY_TENSORS = (EMBEDDING, HEAD)
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}
_KNOWN_FIELDS = frozenset(
    {
        *("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_size", "vocab_size", "padded_vocab_size"),
        *("max_positions", "norm", "norm_eps", "activation", "position", "rotary_dims", "rotary_base", "residual"),
        *("tied_head", "attention_bias", "mlp_bias", "attention_dropout", "hidden_dropout"),
        *("init_method", "output_init_method", "init_std", "head_dim", "qkv_bias", "rpe_buckets", "rpe_max_distance"),
    }
)
_TANH_NAMES = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_BLOCK = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "attention.query_key_value": "attention.query_key_value",
    "attention.dense": "attention.dense",
    "mlp.linear1": "mlp.dense_h_to_4h",
    "mlp.linear2": "mlp.dense_4h_to_h",
}


def refusals(spec: ModelSpec) -> list[str]:
    """Why GPTNeoXForCausalLM cannot compute this model; empty if it can."""
    wrong = {
        "norm": (spec.norm, spec.norm == "layernorm"),
        "pos_emb": (spec.position, spec.position == "rotary"),
        "rotary_pct": (f"{spec.rotary_dims} of {spec.head_dim}", spec.rotary_dims > 0 and spec.rotary_dims % 2 == 0),
        "num_kv_heads": (spec.num_kv_heads, spec.num_kv_heads == spec.num_heads),
        "activation": (spec.activation, spec.activation in _ACTIVATIONS),
        "use_bias_in_mlp": (spec.mlp_bias, spec.mlp_bias),
        "use_bias_in_qkv": (spec.qkv_bias, spec.qkv_bias == spec.attention_bias),
        "head_dim": (spec.head_dim, spec.head_dim * spec.num_heads == spec.hidden_size),
    }
    # A field that a later version adds changes the function in ways that this file has not heard of.
    foreign = [f for f in fields(spec) if f.name not in _KNOWN_FIELDS and getattr(spec, f.name) != f.default]
    return [f"{key} is {value}" for key, (value, is_possible) in wrong.items() if not is_possible] + [
        f"{field.name} is {getattr(spec, field.name)}" for field in foreign
    ]


def source_names(spec: ModelSpec) -> dict[str, str]:
    """Hugging Face's name of every tensor of the file -> ours, in the order of the model.

    A block whose MLP reads the attention's norm (gpt_j_tied) has that norm written twice, which is the same function.
    """
    names = {"gpt_neox.embed_in.weight": EMBEDDING}
    for index in range(spec.num_layers):
        for ours, theirs in _BLOCK.items():
            is_shared_norm = ours == "post_attention_layernorm" and spec.residual == "parallel_tied"
            source = "input_layernorm" if is_shared_norm else ours
            for part in ("weight", "bias"):
                if part == "weight" or spec.attention_bias or not ours.startswith("attention."):
                    names[f"gpt_neox.layers.{index}.{theirs}.{part}"] = f"layers.{index}.{source}.{part}"
    names |= {f"gpt_neox.final_layer_norm.{part}": f"final_norm.{part}" for part in ("weight", "bias")}
    if not spec.tied_head:
        names["embed_out.weight"] = HEAD
    return names


def native_names(spec: ModelSpec) -> dict[str, str]:
    """Our name of every tensor -> Hugging Face's: the inverse of `source_names`."""
    return {ours: theirs for theirs, ours in reversed(source_names(spec).items())}


def config_json(spec: ModelSpec, *, dtype: str, eod_id: int | None, pad_id: int | None) -> dict[str, Any]:
    """The content of config.json, read alike by transformers 4.38 to 5.x.

    Old and new readers look for the rotary values and the type under different keys, so both are written.
    dtype: "float32" | "float16" | "bfloat16".
    Raises: CheckpointError naming what GPT-NeoX cannot express.
    """
    if reasons := refusals(spec):
        raise CheckpointError(
            f"this model is not a GPTNeoXForCausalLM: {'; '.join(reasons)}. GPT-NeoX there has layernorm, rotary "
            f"positions, multi-head attention, MLP biases and one of {', '.join(_ACTIVATIONS)}."
        )
    rotary_pct = spec.rotary_dims / spec.head_dim
    assert int(spec.head_dim * rotary_pct) == spec.rotary_dims
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.ffn_size,
        "hidden_act": _ACTIVATIONS[spec.activation],
        "max_position_embeddings": spec.max_positions,
        "layer_norm_eps": spec.norm_eps,
        "attention_bias": spec.attention_bias,
        "attention_dropout": spec.attention_dropout,
        "hidden_dropout": spec.hidden_dropout,
        "initializer_range": spec.init_std,
        "use_parallel_residual": spec.residual != "sequential",
        "tie_word_embeddings": spec.tied_head,
        "rotary_pct": rotary_pct,
        "rotary_emb_base": spec.rotary_base,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": spec.rotary_base,
            "partial_rotary_factor": rotary_pct,
        },
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        "pad_token_id": pad_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def spec_from_config(config: Mapping[str, Any], *, padded_vocab_size: int | None = None) -> ModelSpec:
    """The ModelSpec of a GPT-NeoX config.json; its defaults are those of transformers' GPTNeoXConfig.

    Raises: CheckpointError for another model, an activation or a rotary scaling that is not known here.
    """
    if config.get("model_type") != "gpt_neox":
        raise CheckpointError(f"config.json has model_type {config.get('model_type')!r}; required is 'gpt_neox'")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise CheckpointError(f"config.json scales rotary positions by {kind!r}; only 'default' is known")
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | dict.fromkeys(_TANH_NAMES, "gelu_tanh")
    hidden_act = config.get("hidden_act", "gelu")
    if hidden_act not in activations:
        raise CheckpointError(f"config.json has hidden_act {hidden_act!r}; known are {', '.join(activations)}")
    hidden, heads = config.get("hidden_size", 6144), config.get("num_attention_heads", 64)
    rotary_pct = rope.get("partial_rotary_factor", config.get("rotary_pct", 0.25))
    residual: Residual = "parallel" if config.get("use_parallel_residual", True) else "sequential"
    vocab_size = config.get("vocab_size", 50432)
    return ModelSpec(
        num_layers=config.get("num_hidden_layers", 44),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_size=config.get("intermediate_size", 24576),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size or vocab_size,
        max_positions=config.get("max_position_embeddings", 2048),
        norm_eps=config.get("layer_norm_eps", 1e-5),
        activation=activations[hidden_act],
        rotary_dims=int(hidden // heads * rotary_pct),
        rotary_base=rope.get("rope_theta", config.get("rotary_emb_base", 10000)),
        residual=residual,
        tied_head=config.get("tie_word_embeddings", False),
        attention_bias=config.get("attention_bias", True),
        attention_dropout=config.get("attention_dropout", 0.0),
        hidden_dropout=config.get("hidden_dropout", 0.0),
        init_std=config.get("initializer_range", 0.02),
    )
