"""Every parameter of a model by name and shape, and the counts that follow.

Builds nothing. Invariant: names and shapes are those of the model that `megatron.model` builds from the same keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron.common.errors import ConfigError
from megatron.config.resolved import Config


@dataclass(frozen=True)
class Parameter:
    """One parameter. layer: the block it belongs to, or None. sharded: whether tensor-parallel ranks divide it."""

    name: str
    shape: tuple[int, ...]
    sharded: bool
    layer: int | None = None

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class ParameterCount:
    """Elements.

    unique: of the model itself, at any layout.
    counted: as DeepSpeed counts, those that tensor-parallel ranks replicate once for each.
    embedding: of the token and position tables and the output head.
    per_device: on the fullest rank (its stage, its tensor-parallel share).
    """

    unique: int
    counted: int
    embedding: int
    per_device: int


def require_vocabulary(config: Config) -> None:
    """Raises: ConfigError if the rows of the embedding are not known, because the tokenizer's file is missing."""
    if config.tokenizer.padded_vocab_size is None:
        raise ConfigError(
            f"{config.origin('vocab_file')}: the size of the vocabulary is not known: {config.tokenizer.vocab_file} "
            "is not "
            "there. Make the tokenizer first (prepare_data.py does), or set padded_vocab_size."
        )


def parameters(config: Config) -> Iterator[Parameter]:
    """All parameters, in the order of the layers. Raises: ConfigError if the vocabulary's size is not known."""
    model, rows = config.model, config.tokenizer.padded_vocab_size
    hidden, heads, kv_heads, ffn = model.hidden_size, model.num_attention_heads, model.num_kv_heads, model.ffn_size
    require_vocabulary(config)
    tp = config.parallel.model_parallel_size
    has_norm_bias = model.norm == "layernorm"
    has_norm_weight = model.norm != "non_parametric_layernorm"
    attended, kv_size = heads * model.head_dim, 2 * kv_heads * model.head_dim

    def norm(name: str, layer: int | None = None, size: int = hidden) -> Iterator[Parameter]:
        if has_norm_weight:
            yield Parameter(f"{name}.weight", (1 if model.norm == "scalenorm" else size,), False, layer)
        if has_norm_bias:
            yield Parameter(f"{name}.bias", (size,), False, layer)

    def linear(name: str, out: int, into: int, bias: bool, column: bool, layer: int) -> Iterator[Parameter]:
        # A column-parallel layer divides its outputs, bias included; a row-parallel one its inputs.
        yield Parameter(f"{name}.weight", (out, into), True, layer)
        if bias:
            yield Parameter(f"{name}.bias", (out,), column, layer)

    yield Parameter("embedding.word_embeddings.weight", (rows, hidden), True)
    if model.pos_emb == "learned":
        positions = model.max_position_embeddings + model.opt_pos_emb_offset
        yield Parameter("embedding.position_embeddings.weight", (positions, hidden), False)
    qkv_bias, attention_bias, mlp_bias = model.use_bias_in_qkv, model.use_bias_in_attn_linear, model.use_bias_in_mlp
    for layer in range(model.num_layers):
        name = f"layers.{layer}"
        yield from norm(f"{name}.input_layernorm", layer)
        if kv_heads == heads:
            yield from linear(f"{name}.attention.query_key_value", 3 * attended, hidden, qkv_bias, True, layer)
        else:
            yield from linear(f"{name}.attention.query", attended, hidden, qkv_bias, True, layer)
            key_value = linear(f"{name}.attention.key_value", kv_size, hidden, qkv_bias, True, layer)
            # With more tensor-parallel ranks than kv heads, every rank holds all of them.
            yield from (replace(parameter, sharded=kv_heads % tp == 0) for parameter in key_value)
        if model.use_qk_layernorm:
            yield from norm(f"{name}.attention.query_norm", layer, model.head_dim)
            yield from norm(f"{name}.attention.key_norm", layer, model.head_dim)
        if model.pos_emb == "rpe":
            yield Parameter(f"{name}.attention.rpe.weight", (model.rpe_num_buckets, heads), True, layer)
        yield from linear(f"{name}.attention.dense", hidden, attended, attention_bias, False, layer)
        if not model.gpt_j_tied:
            yield from norm(f"{name}.post_attention_layernorm", layer)
        for part in ("gate", "up") if model.is_gated else ("linear1",):
            yield from linear(f"{name}.mlp.{part}", ffn, hidden, mlp_bias, True, layer)
        yield from linear(f"{name}.mlp.linear2", hidden, ffn, mlp_bias, False, layer)
    yield from norm("final_norm")
    if model.no_weight_tying:
        yield Parameter("head.weight", (rows, hidden), True)
        if model.use_bias_in_head:
            yield Parameter("head.bias", (rows,), True)


def count_parameters(config: Config) -> ParameterCount:
    """Count. Raises: ConfigError if the vocabulary's size is not known."""
    tp, unique, counted, embedding = config.parallel.model_parallel_size, 0, 0, 0
    for parameter in parameters(config):
        unique += parameter.numel
        counted += parameter.numel * (1 if parameter.sharded else tp)
        if parameter.name.startswith(("embedding.", "head.")):
            embedding += parameter.numel
    return ParameterCount(unique, counted, embedding, max(stage_parameters(config)))


def stage_parameters(config: Config) -> list[int]:
    """Elements on one rank of each pipeline stage, blocks dealt out evenly.

    A tied head has its own copy of the embedding on the last stage.
    """
    stages, tp, layers = config.parallel.num_stages, config.parallel.model_parallel_size, config.model.num_layers
    totals = [0] * stages
    for parameter in parameters(config):
        numel = parameter.numel // tp if parameter.sharded else parameter.numel
        if parameter.layer is not None:
            totals[parameter.layer * stages // layers] += numel
        elif parameter.name.startswith("embedding."):
            totals[0] += numel
            if stages > 1 and not config.model.no_weight_tying and "word_embeddings" in parameter.name:
                totals[-1] += numel
        else:
            totals[-1] += numel
    return totals
