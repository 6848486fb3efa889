"""The layers of a model as numbers: parameters by name and shape, matrix products, and what the backward pass needs.

Builds nothing. An architecture switch changes one function here, the one of the part it belongs to. Invariant: names,
shapes and order are those of the layer list that `megatron.model` builds from the same keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron.config.schema import ModelSection

# The classes of megatron.model: pipe_partition_method finds layers by these names.
WORD_EMBEDDING, SOFT_PROMPT, POSITIONS, BLOCK, NORM, HEAD = (
    "WordEmbedding",
    "SoftPromptEmbedding",
    "PositionEmbedding",
    "TransformerBlock",
    "Norm",
    "Head",
)

# Feed-forward widths that the backward pass needs of a non-linearity: its argument, unless the derivative follows from
# the result, and the result, which is the next matrix's input. A gated one needs up and its product as well.
ACTIVATION_WIDTHS = {
    "gelu": 2,
    "gelu_tanh": 2,
    "relu": 1,
    "silu": 2,
    "swish": 2,
    "mish": 2,
    "softsign": 3,
    "geglu": 4,
    "geglu_tanh": 4,
    "swiglu": 4,
    "reglu": 3,
    "glu": 3,
    "bilinear": 3,
}


@dataclass(frozen=True)
class Parameter:
    """One parameter. layer: its block, or None. sharded: tensor-parallel ranks divide it. trained: it learns."""

    name: str
    shape: tuple[int, ...]
    sharded: bool
    layer: int | None = None
    trained: bool = True

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Kept:
    """Something of every token that waits for the backward pass.

    size: elements of one token. divided: over the tensor-parallel ranks, always; over_tokens: only with sequence
    parallelism. in_attention: selective recomputation makes it again. word: bytes of an element, None for the
    activations' own. is_input: full recomputation keeps it, where a group begins. only_on: the device that needs it.
    of_batch: all sequences of a micro-batch share it. only_half: needed in half precision alone.
    """

    what: str
    size: int
    divided: bool = False
    over_tokens: bool = False
    in_attention: bool = False
    word: int | None = None
    is_input: bool = False
    only_on: str | None = None
    of_batch: bool = False
    only_half: bool = False


@dataclass(frozen=True)
class Layer:
    """One entry of the layer list. flops: forward, of one token, by term."""

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    flops: tuple[tuple[str, int], ...] = ()
    kept: tuple[Kept, ...] = ()
    ties: bool = False

    def numel_on_rank(self, tp: int) -> int:
        """Elements on one tensor-parallel rank."""
        return sum(p.numel // tp if p.sharded else p.numel for p in self.parameters)

    def trained_on_rank(self, tp: int) -> int:
        """Of these, the elements that learn."""
        return sum(p.numel // tp if p.sharded else p.numel for p in self.parameters if p.trained)


def architecture(model: ModelSection, rows: int, tp: int) -> tuple[Layer, ...]:
    """The layers of a model with `rows` rows of vocabulary; with few kv heads, what is sharded depends on `tp`."""
    embedding = Parameter("embedding.word_embeddings.weight", (rows, model.hidden_size), True)
    found = [Layer("embedding.word_embeddings", WORD_EMBEDDING, (embedding,), kept=tuple(_embedding_kept(model)))]
    found += _positions(model)
    first = _block(model, tp)
    for index in range(model.num_layers):
        named = tuple(
            replace(p, name=f"layers.{index}.{p.name}", layer=index) for p in first.parameters
        )  # the same shapes again
        found.append(replace(first, name=f"layers.{index}", parameters=named))
    # The next layer's input is kept by that layer; the final norm's own is the last block's output.
    final = (Kept("input of the final norm", model.hidden_size, over_tokens=True), *_norm_kept(model, 1))
    found.append(Layer("final_norm", NORM, tuple(_norm("final_norm", model)), kept=final))
    product = (("vocabulary", 2 * model.hidden_size * rows),)
    head = _head_parameters(model, rows) if model.no_weight_tying else ()
    found.append(Layer("head", HEAD if head else WORD_EMBEDDING, head, product, ties=not head))
    return tuple(found)


def _has_position_layer(model: ModelSection) -> bool:
    return model.pos_emb in ("learned", "sinusoidal")


def _embedding_kept(model: ModelSection) -> Iterator[Kept]:
    if not _has_position_layer(model):
        yield from _dropout_kept(model, "embeddings' dropout", model.hidden_size)


def _positions(model: ModelSection) -> list[Layer]:
    """The layer that adds positions to the embeddings, where there is one."""
    if not _has_position_layer(model):
        return []
    table = (model.max_position_embeddings + model.opt_pos_emb_offset, model.hidden_size)
    name = "embedding.position_embeddings.weight"
    parameters = (Parameter(name, table, False),) if model.pos_emb == "learned" else ()
    kept = tuple(_dropout_kept(model, "embeddings' dropout", model.hidden_size))
    return [Layer("embedding.position_embeddings", POSITIONS, parameters, kept=kept)]


def _head_parameters(model: ModelSection, rows: int) -> tuple[Parameter, ...]:
    weight = Parameter("head.weight", (rows, model.hidden_size), True)
    return (weight, Parameter("head.bias", (rows,), True)) if model.use_bias_in_head else (weight,)


def _block(model: ModelSection, tp: int) -> Layer:
    """One transformer block; its parameters are named within the block."""
    hidden, norms = model.hidden_size, 1 if model.gpt_j_tied else 2
    parameters = [*_norm("input_layernorm", model), *_attention_parameters(model, tp)]
    if not model.gpt_j_tied:
        parameters += _norm("post_attention_layernorm", model)
    parameters += _feed_forward_parameters(model)
    kept = [Kept("block's input", hidden, over_tokens=True, is_input=True)]
    if not model.gpt_j_residual:
        kept.append(Kept("residual between attention and feed-forward", hidden, over_tokens=True))
    # What a norm makes is the next matrices' input: gathered, so whole on every rank.
    kept += [Kept("normed input", hidden)] * norms
    kept += [*_norm_kept(model, norms), *_attention_kept(model, tp), *_feed_forward_kept(model)]
    for where in ("attention's dropout", "feed-forward's dropout"):
        kept += _dropout_kept(model, where, hidden)
    flops = (*_attention_flops(model), *_feed_forward_flops(model))
    return Layer("", BLOCK, tuple(parameters), flops, tuple(kept))


def _norm(name: str, model: ModelSection, size: int | None = None) -> Iterator[Parameter]:
    size = size or model.hidden_size
    if model.norm != "non_parametric_layernorm":
        yield Parameter(f"{name}.weight", (1 if model.norm == "scalenorm" else size,), False)
    if model.norm == "layernorm":
        yield Parameter(f"{name}.bias", (size,), False)


def _norm_kept(model: ModelSection, count: int, size: int | None = None, *, divided: bool = False) -> Iterator[Kept]:
    """What norms keep beside their input: layernorm two numbers, rmsnorm one, in kernels of one piece.

    scalenorm has no such kernel, rmsnorm none on a CPU: what is multiplied with the weight is kept as well, and in half
    precision the fp32 copy of the input.
    """
    size = size or model.hidden_size
    where: dict[str, Any] = {"divided": divided, "over_tokens": not divided, "in_attention": divided}
    heads = model.num_attention_heads + model.num_kv_heads if divided else 1
    numbers = 2 if "layernorm" in model.norm else 1
    yield Kept("norm's statistics", count * numbers * heads, word=4, **where)
    if model.norm in ("rmsnorm", "scalenorm"):
        device = "cpu" if model.norm == "rmsnorm" else None
        yield Kept("normed input before the weight", count * size * heads, only_on=device, **where)
        yield Kept("norm's input in fp32", count * size * heads, word=4, only_on=device, only_half=True, **where)


def _dropout_kept(model: ModelSection, what: str, size: int) -> Iterator[Kept]:
    """The mask: a byte per element on a GPU, a factor on a CPU."""
    if model.hidden_dropout:
        yield Kept(what, size, over_tokens=True, word=1, only_on="cuda")
        yield Kept(what, size, over_tokens=True, only_on="cpu")


def _linear(name: str, out: int, into: int, bias: bool, column: bool) -> Iterator[Parameter]:
    # A column-parallel layer divides its outputs, bias included; a row-parallel one its inputs.
    yield Parameter(f"{name}.weight", (out, into), True)
    if bias:
        yield Parameter(f"{name}.bias", (out,), column)


def _attention_parameters(model: ModelSection, tp: int) -> Iterator[Parameter]:
    hidden, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_kv_heads
    attended, bias = heads * model.head_dim, model.use_bias_in_qkv
    if kv_heads == heads:
        yield from _linear("attention.query_key_value", 3 * attended, hidden, bias, True)
    else:
        yield from _linear("attention.query", attended, hidden, bias, True)
        # With more tensor-parallel ranks than kv heads, every rank holds all of them.
        for parameter in _linear("attention.key_value", 2 * kv_heads * model.head_dim, hidden, bias, True):
            yield replace(parameter, sharded=kv_heads % tp == 0)
    if model.use_qk_layernorm:
        yield from _norm("attention.query_norm", model, model.head_dim)
        yield from _norm("attention.key_norm", model, model.head_dim)
    if model.pos_emb == "rpe":
        yield Parameter("attention.rpe.weight", (model.rpe_num_buckets, heads), True)
    yield from _linear("attention.dense", hidden, attended, model.use_bias_in_attn_linear, False)


def _attention_kept(model: ModelSection, tp: int) -> Iterator[Kept]:
    heads = model.num_attention_heads
    # A rank works with its part of the kv heads, and with at least one, which it may share with others.
    width, kv_width = heads * model.head_dim, max(model.num_kv_heads, tp) * model.head_dim
    is_fused, turns = model.num_kv_heads == heads, model.pos_emb == "rotary"
    # Rotation and head norms make new queries and keys. Of the old ones stays what shares its memory with the values,
    # and what a head norm's backward pass reads.
    size = 3 * width if is_fused else 2 * kv_width + (width if model.use_qk_layernorm or not turns else 0)
    if turns or model.use_qk_layernorm:
        size += width + kv_width
    yield Kept("queries, keys, values", size, divided=True, in_attention=True)
    yield Kept("softmax's normaliser", heads, divided=True, in_attention=True, word=4)
    if model.use_qk_layernorm:
        yield from _norm_kept(model, 1, model.head_dim, divided=True)
    yield from _scores_kept(model, 0 if is_fused else 2 * (width - kv_width))
    yield Kept("attended values", width, divided=True)


def _scores_kept(model: ModelSection, expansion: int) -> Iterator[Kept]:
    """What torch's attention keeps on a CPU when sight is limited or biased; kernels for GPUs make it as they go.

    expansion: elements by which keys and values grow when every query head gets its own.
    """
    sequence, heads = model.seq_length, model.num_attention_heads
    where: dict[str, Any] = {"in_attention": True, "only_on": "cpu"}
    if model.attention_dropout:
        yield Kept("attention probabilities and their dropout", 2 * heads * sequence, divided=True, **where)
    if model.pos_emb == "rpe":
        # A bias that learns takes the path without a kernel.
        yield Kept("attention probabilities", heads * sequence, divided=True, **where)
        yield Kept("buckets of distances", sequence, of_batch=True, word=8, **where)
    elif model.pos_emb == "alibi":
        yield Kept("bias of the scores", heads * sequence, divided=True, of_batch=True, **where)
    elif model.sliding_window_width is not None:
        yield Kept("mask of the scores", sequence, of_batch=True, **where)
    else:
        return
    yield Kept("keys and values for every query head", expansion, divided=True, **where)


def _attention_flops(model: ModelSection) -> Iterator[tuple[str, int]]:
    hidden, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_kv_heads
    width = heads * model.head_dim
    yield "query_key_value", 2 * hidden * (heads + 2 * kv_heads) * model.head_dim
    yield "scores", 2 * model.seq_length * width
    yield "weighted_values", 2 * model.seq_length * width
    yield "attention_output", 2 * width * hidden


def _feed_forward_parameters(model: ModelSection) -> Iterator[Parameter]:
    hidden, bias = model.hidden_size, model.use_bias_in_mlp
    for part in ("gate", "up") if model.is_gated else ("linear1",):
        yield from _linear(f"mlp.{part}", model.ffn_size, hidden, bias, True)
    yield from _linear("mlp.linear2", hidden, model.ffn_size, bias, False)


def _feed_forward_kept(model: ModelSection) -> Iterator[Kept]:
    yield Kept("feed-forward", ACTIVATION_WIDTHS[model.activation] * model.ffn_size, divided=True)


def _feed_forward_flops(model: ModelSection) -> Iterator[tuple[str, int]]:
    yield "feed_forward", 2 * model.hidden_size * model.ffn_size * (3 if model.is_gated else 2)
