"""GPT-NeoX: the 20B model, Pythia, Polyglot, Japanese variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron.convert.family import EMBEDDING, NEOX_HEADS, Family, Values, pair, rope_keys
from megatron.convert.recipes import SAME, Group
from megatron.model.spec import ModelSpec

_ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"},
    **{"relu": "relu", "silu": "silu", "swish": "silu", "mish": "mish"},
}
PLAIN_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu", "mish": "mish"}


def _read(config: Mapping[str, Any]) -> ModelSpec:
    values = Values(config, "GPT-NeoX")
    hidden, heads = values.get("hidden_size", 6144), values.get("num_attention_heads", 64)
    rope = values.rope(base_key="rotary_emb_base")
    block = values.get("rope_parameters") or {}
    rotary_pct = block.get("partial_rotary_factor", values.get("rotary_pct", 0.25))
    return ModelSpec(
        num_layers=values.get("num_hidden_layers", 44),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_size=values.get("intermediate_size", 24576),
        vocab_size=values.get("vocab_size", 50432),
        padded_vocab_size=values.get("vocab_size", 50432),
        max_positions=values.get("max_position_embeddings", 2048),
        norm_eps=values.get("layer_norm_eps", 1e-5),
        activation=values.choice("hidden_act", "gelu", _ACTIVATIONS),
        rotary_dims=int(hidden // heads * rotary_pct),
        **rope,
        residual="parallel" if values.get("use_parallel_residual", True) else "sequential",
        tied_head=values.get("tie_word_embeddings", False),
        attention_bias=values.get("attention_bias", True),
        attention_dropout=values.get("attention_dropout", 0.0),
        hidden_dropout=values.get("hidden_dropout", 0.0),
        init_std=values.get("initializer_range", 0.02),
    )


def _write(spec: ModelSpec) -> dict[str, Any]:
    rotary_pct = spec.rotary_dims / spec.head_dim
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.ffn_size,
        "hidden_act": PLAIN_NAMES.get(spec.activation, spec.activation),
        "max_position_embeddings": spec.max_positions,
        "layer_norm_eps": spec.norm_eps,
        "attention_bias": spec.attention_bias,
        "attention_dropout": spec.attention_dropout,
        "hidden_dropout": spec.hidden_dropout,
        "initializer_range": spec.init_std,
        "use_parallel_residual": spec.residual == "parallel",
        "rotary_pct": rotary_pct,
        **rope_keys(spec, "rotary_emb_base", partial_rotary_factor=rotary_pct),
    }


def _groups(spec: ModelSpec) -> list[Group]:
    groups = [Group(("gpt_neox.embed_in.weight",), (EMBEDDING,), SAME)]
    for index in range(spec.num_layers):
        theirs, ours = f"gpt_neox.layers.{index}", f"layers.{index}"
        # One norm for both branches (gpt_j_tied) is written twice there: the same function.
        second = "input_layernorm" if spec.residual == "parallel_tied" else "post_attention_layernorm"
        bias = spec.attention_bias
        groups += [
            *pair(f"{theirs}.input_layernorm", f"{ours}.input_layernorm"),
            *pair(f"{theirs}.post_attention_layernorm", f"{ours}.{second}"),
            *pair(f"{theirs}.attention.query_key_value", f"{ours}.attention.query_key_value", bias=bias),
            *pair(f"{theirs}.attention.dense", f"{ours}.attention.dense", bias=bias),
            *pair(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.mlp.linear1"),
            *pair(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.mlp.linear2"),
        ]
    return [*groups, *pair("gpt_neox.final_layer_norm", "final_norm")]


def _as_expressed(spec: ModelSpec) -> ModelSpec:
    return replace(spec, residual="parallel") if spec.residual == "parallel_tied" else spec


GPT_NEOX = Family(
    "gpt_neox", "GPTNeoXForCausalLM", _read, _write, _groups, "gpt_neox.",
    (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq"), "embed_out.weight", _as_expressed,
    NEOX_HEADS,
)  # fmt: skip
