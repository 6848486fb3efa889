"""GPT-2, GPTBigCode (SantaCoder, StarCoder) and GPT-J: learned or interleaved rotary positions, names of GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.common.errors import CheckpointError
from megatron.convert.families.neox import PLAIN_NAMES
from megatron.convert.family import EMBEDDING, Family, Values, grouped_projection, joint, pair, separate_projections
from megatron.convert.recipes import SAME, TRANSPOSED, Group, chain, grouped, interleaved, three_blocks
from megatron.model.spec import ModelSpec

_ACTIVATIONS = {
    **{"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"},
    **{"relu": "relu", "silu": "silu", "swish": "silu"},
}
_NAMES = {**PLAIN_NAMES, "gelu_tanh": "gelu_new"}
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attn.embed_positions")


def _sizes(values: Values) -> dict[str, Any]:
    hidden = values.get("n_embd", 768)
    return {
        "num_layers": values.get("n_layer", 12),
        "hidden_size": hidden,
        "num_heads": values.get("n_head", 12),
        "ffn_size": values.get("n_inner", 4 * hidden),
        "norm_eps": values.get("layer_norm_epsilon", 1e-5),
        "attention_dropout": values.get("attn_pdrop", 0.0),
        "hidden_dropout": values.get("resid_pdrop", 0.0),
        "init_std": values.get("initializer_range", 0.02),
    }


def _common(spec: ModelSpec) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab_size,
        "n_positions": spec.max_positions,
        "n_embd": spec.hidden_size,
        "n_layer": spec.num_layers,
        "n_head": spec.num_heads,
        "n_inner": spec.ffn_size,
        "activation_function": _NAMES.get(spec.activation, spec.activation),
        "layer_norm_epsilon": spec.norm_eps,
        "attn_pdrop": spec.attention_dropout,
        "resid_pdrop": spec.hidden_dropout,
        "embd_pdrop": spec.hidden_dropout,
        "initializer_range": spec.init_std,
        "scale_attn_weights": True,
    }


def _read_gpt2(config: Mapping[str, Any]) -> ModelSpec:
    values = Values(config, "GPT-2")
    values.need("scale_attn_weights", True)
    values.need("scale_attn_by_inverse_layer_idx", False)
    values.need("add_cross_attention", False)
    sizes, vocab = _sizes(values), values.get("vocab_size", 50257)
    return ModelSpec(
        **sizes,
        num_kv_heads=sizes["num_heads"],
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_positions=values.get("n_positions", 1024),
        position="learned",
        activation=values.choice("activation_function", "gelu_new", _ACTIVATIONS),
        tied_head=values.get("tie_word_embeddings", True),
    )


def _read_bigcode(config: Mapping[str, Any]) -> ModelSpec:
    values = Values(config, "GPTBigCode")
    values.need("scale_attn_weights", True)
    values.need("add_cross_attention", False)
    sizes, vocab = _sizes(values), values.get("vocab_size", 50257)
    return ModelSpec(
        **sizes,
        num_kv_heads=1 if values.get("multi_query", True) else sizes["num_heads"],
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_positions=values.get("n_positions", 1024),
        position="learned",
        activation=values.choice("activation_function", "gelu_pytorch_tanh", _ACTIVATIONS),
        tied_head=values.get("tie_word_embeddings", True),
    )


def _read_gptj(config: Mapping[str, Any]) -> ModelSpec:
    values = Values({"n_embd": 4096, "n_layer": 28, "n_head": 16, **config}, "GPT-J")
    sizes, vocab = _sizes(values), values.get("vocab_size", 50400)
    values.need("tie_word_embeddings", False)
    if (rotary_dims := config.get("rotary_dim", 64)) is None:
        raise CheckpointError("config.json of this GPT-J has rotary_dim = None, which is not known here")
    return ModelSpec(
        **sizes,
        num_kv_heads=sizes["num_heads"],
        vocab_size=vocab,
        padded_vocab_size=vocab,
        max_positions=values.get("n_positions", 2048),
        position="rotary",
        rotary_dims=rotary_dims,
        rotary_interleaved=True,
        residual="parallel_tied",
        activation=values.choice("activation_function", "gelu_new", _ACTIVATIONS),
        attention_bias=False,
        tied_head=False,
        head_bias=True,
    )


def _write_gpt2(spec: ModelSpec) -> dict[str, Any]:
    return {**_common(spec), "scale_attn_by_inverse_layer_idx": False}


def _write_bigcode(spec: ModelSpec) -> dict[str, Any]:
    name = PLAIN_NAMES.get(spec.activation, spec.activation)
    return {**_common(spec), "activation_function": name, "multi_query": spec.num_kv_heads == 1 < spec.num_heads}


def _write_gptj(spec: ModelSpec) -> dict[str, Any]:
    return {**_common(spec), "rotary_dim": spec.rotary_dims}


def _gpt2_groups(spec: ModelSpec) -> list[Group]:
    attention = chain(three_blocks(), interleaved(3, spec.num_heads, spec.head_dim))
    groups = _ends(spec)
    for index in range(spec.num_layers):
        theirs, ours = f"transformer.h.{index}", f"layers.{index}"
        groups += [
            *pair(f"{theirs}.ln_1", f"{ours}.input_layernorm"),
            *pair(
                f"{theirs}.attn.c_attn", f"{ours}.attention.query_key_value", chain(TRANSPOSED, attention),
                of_bias=attention,
            ),
            *pair(f"{theirs}.attn.c_proj", f"{ours}.attention.dense", TRANSPOSED),
            *pair(f"{theirs}.ln_2", f"{ours}.post_attention_layernorm"),
            *pair(f"{theirs}.mlp.c_fc", f"{ours}.mlp.linear1", TRANSPOSED),
            *pair(f"{theirs}.mlp.c_proj", f"{ours}.mlp.linear2", TRANSPOSED),
        ]  # fmt: skip
    return [*groups, *pair("transformer.ln_f", "final_norm")]


def _bigcode_groups(spec: ModelSpec) -> list[Group]:
    groups = _ends(spec)
    for index in range(spec.num_layers):
        theirs, ours = f"transformer.h.{index}", f"layers.{index}"
        # All queries, then the one key and value: a single group.
        attention = (
            joint(
                [f"{theirs}.attn.c_attn"],
                [f"{ours}.attention.query", f"{ours}.attention.key_value"],
                grouped(spec.num_heads, 1, spec.head_dim),
                bias=True,
            )
            if spec.num_kv_heads < spec.num_heads
            else grouped_projection(spec, f"{theirs}.attn.c_attn", f"{ours}.attention")
        )
        groups += [
            *pair(f"{theirs}.ln_1", f"{ours}.input_layernorm"),
            *attention,
            *pair(f"{theirs}.attn.c_proj", f"{ours}.attention.dense"),
            *pair(f"{theirs}.ln_2", f"{ours}.post_attention_layernorm"),
            *pair(f"{theirs}.mlp.c_fc", f"{ours}.mlp.linear1"),
            *pair(f"{theirs}.mlp.c_proj", f"{ours}.mlp.linear2"),
        ]
    return [*groups, *pair("transformer.ln_f", "final_norm")]


def _gptj_groups(spec: ModelSpec) -> list[Group]:
    groups = [Group(("transformer.wte.weight",), (EMBEDDING,), SAME)]
    for index in range(spec.num_layers):
        theirs, ours = f"transformer.h.{index}", f"layers.{index}"
        groups += [
            *pair(f"{theirs}.ln_1", f"{ours}.input_layernorm"),
            *separate_projections(spec, f"{theirs}.attn", f"{ours}.attention"),
            *pair(f"{theirs}.attn.out_proj", f"{ours}.attention.dense", bias=False),
            *pair(f"{theirs}.mlp.fc_in", f"{ours}.mlp.linear1"),
            *pair(f"{theirs}.mlp.fc_out", f"{ours}.mlp.linear2"),
        ]
    return [*groups, *pair("transformer.ln_f", "final_norm")]


def _ends(spec: ModelSpec) -> list[Group]:
    return [
        Group(("transformer.wte.weight",), (EMBEDDING,), SAME),
        Group(("transformer.wpe.weight",), ("embedding.position_embeddings.weight",), SAME),
    ]


GPT2 = Family("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2, _gpt2_groups, "transformer.", _BUFFERS)
GPT_BIGCODE = Family(
    "gpt_bigcode", "GPTBigCodeForCausalLM", _read_bigcode, _write_bigcode, _bigcode_groups, "transformer.", _BUFFERS
)
GPT_J = Family("gptj", "GPTJForCausalLM", _read_gptj, _write_gptj, _gptj_groups, "transformer.", _BUFFERS)
