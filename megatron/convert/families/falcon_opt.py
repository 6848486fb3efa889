"""Falcon (7B's decoder and the newer one of 40B and 11B) and OPT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.convert.families.neox import PLAIN_NAMES
from megatron.convert.family import (
    EMBEDDING,
    Family,
    Values,
    grouped_projection,
    pair,
    rope_keys,
    separate_projections,
)
from megatron.convert.recipes import SAME, Group
from megatron.model.spec import ModelSpec, Residual

_ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
    **{"relu": "relu", "silu": "silu", "swish": "silu"},
}


def _read_falcon(config: Mapping[str, Any]) -> ModelSpec:
    values = Values(config, "Falcon")
    values.need("alibi", False)
    hidden, heads = values.get("hidden_size", 4544), values.get("num_attention_heads", 71)
    is_new, is_parallel = values.get("new_decoder_architecture", False), values.get("parallel_attn", True)
    if is_new:
        values.need("parallel_attn", True)
        kv_heads = values.get("num_kv_heads", heads)
        norms = values.get("num_ln_in_parallel_attn", 2)
    else:
        kv_heads, norms = (1 if values.get("multi_query", True) else heads), 1
    residual: Residual = "sequential" if not is_parallel else "parallel" if norms == 2 else "parallel_tied"
    vocab, bias = values.get("vocab_size", 65024), values.get("bias", False)
    return ModelSpec(
        num_layers=values.get("num_hidden_layers", 32),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_size=values.get("ffn_hidden_size", 4 * hidden),
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_positions=values.get("max_position_embeddings", 2048),
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        activation=values.choice("activation", "gelu", _ACTIVATIONS),
        rotary_dims=hidden // heads,
        **values.rope(),
        residual=residual,
        tied_head=values.get("tie_word_embeddings", True),
        attention_bias=bias,
        mlp_bias=bias,
        attention_dropout=values.get("attention_dropout", 0.0),
        hidden_dropout=values.get("hidden_dropout", 0.0),
        init_std=values.get("initializer_range", 0.02),
    )


def _write_falcon(spec: ModelSpec) -> dict[str, Any]:
    is_new = spec.residual == "parallel" or 1 < spec.num_kv_heads < spec.num_heads
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "ffn_hidden_size": spec.ffn_size,
        "activation": PLAIN_NAMES.get(spec.activation, spec.activation),
        "max_position_embeddings": spec.max_positions,
        "layer_norm_epsilon": spec.norm_eps,
        "alibi": False,
        "bias": spec.mlp_bias,
        "multi_query": spec.num_kv_heads == 1,
        "new_decoder_architecture": is_new,
        "num_ln_in_parallel_attn": (2 if spec.residual == "parallel" else 1) if is_new else None,
        "parallel_attn": spec.residual != "sequential",
        "attention_dropout": spec.attention_dropout,
        "hidden_dropout": spec.hidden_dropout,
        "initializer_range": spec.init_std,
        **rope_keys(spec),
    }


def _falcon_groups(spec: ModelSpec) -> list[Group]:
    groups = [Group(("transformer.word_embeddings.weight",), (EMBEDDING,), SAME)]
    bias = spec.mlp_bias
    for index in range(spec.num_layers):
        theirs, ours = f"transformer.h.{index}", f"layers.{index}"
        first, second = ("ln_attn", "ln_mlp") if spec.residual == "parallel" else ("input_layernorm", "")
        if spec.residual == "sequential":
            second = "post_attention_layernorm"
        groups += pair(f"{theirs}.{first}", f"{ours}.input_layernorm")
        if second:
            groups += pair(f"{theirs}.{second}", f"{ours}.post_attention_layernorm")
        groups += [
            *grouped_projection(spec, f"{theirs}.self_attention.query_key_value", f"{ours}.attention"),
            *pair(f"{theirs}.self_attention.dense", f"{ours}.attention.dense", bias=bias),
            *pair(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.mlp.linear1", bias=bias),
            *pair(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.mlp.linear2", bias=bias),
        ]
    return [*groups, *pair("transformer.ln_f", "final_norm")]


def _read_opt(config: Mapping[str, Any]) -> ModelSpec:
    values = Values(config, "OPT")
    hidden, heads = values.get("hidden_size", 768), values.get("num_attention_heads", 12)
    values.need("do_layer_norm_before", True)
    values.need("_remove_final_layer_norm", False)
    values.need("layer_norm_elementwise_affine", True)
    values.need("word_embed_proj_dim", hidden)
    vocab, bias = values.get("vocab_size", 50272), values.get("enable_bias", True)
    return ModelSpec(
        num_layers=values.get("num_hidden_layers", 12),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        ffn_size=values.get("ffn_dim", 3072),
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_positions=values.get("max_position_embeddings", 2048),
        position="learned",
        position_offset=2,
        activation=values.choice("activation_function", "relu", _ACTIVATIONS),
        tied_head=values.get("tie_word_embeddings", True),
        attention_bias=bias,
        mlp_bias=bias,
        attention_dropout=values.get("attention_dropout", 0.0),
        hidden_dropout=values.get("dropout", 0.0),
        init_std=values.get("init_std", 0.02),
    )


def _write_opt(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "word_embed_proj_dim": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "ffn_dim": spec.ffn_size,
        "max_position_embeddings": spec.max_positions,
        "activation_function": PLAIN_NAMES.get(spec.activation, spec.activation),
        "do_layer_norm_before": True,
        "enable_bias": spec.mlp_bias,
        "attention_dropout": spec.attention_dropout,
        "dropout": spec.hidden_dropout,
        "init_std": spec.init_std,
    }


def _opt_groups(spec: ModelSpec) -> list[Group]:
    groups = [
        Group(("model.decoder.embed_tokens.weight",), (EMBEDDING,), SAME),
        Group(("model.decoder.embed_positions.weight",), ("embedding.position_embeddings.weight",), SAME),
    ]
    for index in range(spec.num_layers):
        theirs, ours = f"model.decoder.layers.{index}", f"layers.{index}"
        groups += [
            *pair(f"{theirs}.self_attn_layer_norm", f"{ours}.input_layernorm"),
            *separate_projections(spec, f"{theirs}.self_attn", f"{ours}.attention"),
            *pair(f"{theirs}.self_attn.out_proj", f"{ours}.attention.dense", bias=spec.attention_bias),
            *pair(f"{theirs}.final_layer_norm", f"{ours}.post_attention_layernorm"),
            *pair(f"{theirs}.fc1", f"{ours}.mlp.linear1", bias=spec.mlp_bias),
            *pair(f"{theirs}.fc2", f"{ours}.mlp.linear2", bias=spec.mlp_bias),
        ]
    return [*groups, *pair("model.decoder.final_layer_norm", "final_norm")]


FALCON = Family("falcon", "FalconForCausalLM", _read_falcon, _write_falcon, _falcon_groups, "transformer.")
OPT = Family("opt", "OPTForCausalLM", _read_opt, _write_opt, _opt_groups, "model.")
