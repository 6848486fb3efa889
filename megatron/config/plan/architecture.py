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
    of_batch: all sequences of a micro-batch share it. only_half: needed in half precision alone. needed_by: the places
    of a block (`gradients`) of which one at least must want a gradient; none: always needed.
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
    needed_by: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """One entry of the layer list. flops, backward: of one token, by term, in the forward and in the backward pass."""

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    flops: tuple[tuple[str, int], ...] = ()
    kept: tuple[Kept, ...] = ()
    ties: bool = False
    backward: tuple[tuple[str, int], ...] = ()

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
    blocks = {is_limited: _block(model, tp, is_limited) for is_limited in (False, True)}
    for index in range(model.num_layers):
        block = blocks[_has_window(model, index)]
        named = tuple(replace(p, name=f"layers.{index}.{p.name}", layer=index) for p in block.parameters)
        found.append(replace(block, name=f"layers.{index}", parameters=named))
    # The next layer's input is kept by that layer; the final norm's own is the last block's output.
    final = (Kept("input of the final norm", model.hidden_size, over_tokens=True), *_norm_kept(model))
    found.append(Layer("final_norm", NORM, tuple(_norm("final_norm", model)), kept=final))
    outputs = head_outputs(model, rows)
    term = "vocabulary" if model.task == "causal_lm" else "labels"
    product = ((term, 2 * model.hidden_size * outputs),)
    head = _head_parameters(model, outputs) if model.no_weight_tying or model.task != "causal_lm" else ()
    # Scores of answers keep the hidden states; other losses make the gradients at once.
    is_span = model.task == "question_answering"
    kept = (Kept("hidden states for the scores", model.hidden_size),) if is_span else ()
    found.append(Layer("head", HEAD if head else WORD_EMBEDDING, head, product, kept, ties=not head))
    return tuple(found)


def head_outputs(model: ModelSection, rows: int) -> int:
    """Outputs of the head: the vocabulary's rows, or labels."""
    labels: int | None = 2 if model.task == "question_answering" else model.num_labels
    return rows if model.task == "causal_lm" else labels or 0


def _has_window(model: ModelSection, layer: int) -> bool:
    limited = model.sliding_window_layers
    return model.sliding_window_width is not None and (limited is None or layer in limited)


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


def _head_parameters(model: ModelSection, outputs: int) -> tuple[Parameter, ...]:
    # A head of labels is whole on every rank.
    is_divided = model.task == "causal_lm"
    weight = Parameter("head.weight", (outputs, model.hidden_size), is_divided)
    # transformers has a bias there for these two tasks, and none for classes of sequences.
    always = {"sequence_classification": False, "token_classification": True, "question_answering": True}
    has_bias = always.get(model.task, model.use_bias_in_head)
    return (weight, Parameter("head.bias", (outputs,), is_divided)) if has_bias else (weight,)


def _block(model: ModelSection, tp: int, has_window: bool) -> Layer:
    """One transformer block; its parameters are named within the block."""
    hidden, norms = model.hidden_size, 1 if model.gpt_j_tied else 2
    parameters = [*_norm("input_layernorm", model), *_attention_parameters(model, tp)]
    if not model.gpt_j_tied:
        parameters += _norm("post_attention_layernorm", model)
    parameters += _feed_forward_parameters(model)
    readers = ("normed", "mlp input") if model.gpt_j_residual else ("normed",)
    kept = [Kept("block's input", hidden, over_tokens=True, is_input=True, needed_by=readers)]
    if not model.gpt_j_residual:
        residual = "residual between attention and feed-forward"
        kept.append(Kept(residual, hidden, over_tokens=True, needed_by=("mlp input",)))
    # What a norm makes is the next matrices' input: gathered, so whole on every rank.
    first_readers = ("qkv's weight", "inner weight") if model.gpt_j_tied else ("qkv's weight",)
    kept.append(Kept("normed input", hidden, needed_by=first_readers))
    kept += _norm_kept(model, needed_by=("normed",), weight="first norm's weight")
    if norms == 2:
        kept.append(Kept("normed input", hidden, needed_by=("inner weight",)))
        kept += _norm_kept(model, needed_by=("mlp input",), weight="second norm's weight")
    kept += [*_attention_kept(model, tp, has_window), *_feed_forward_kept(model)]
    kept += _dropout_kept(model, "attention's dropout", hidden, ("projected",))
    kept += _dropout_kept(model, "feed-forward's dropout", hidden, ("leaves",))
    flops = (*_attention_flops(model), *_feed_forward_flops(model))
    return Layer("", BLOCK, tuple(parameters), flops, tuple(kept))


def _norm(name: str, model: ModelSection, size: int | None = None) -> Iterator[Parameter]:
    size = size or model.hidden_size
    if model.norm != "non_parametric_layernorm":
        yield Parameter(f"{name}.weight", (1 if model.norm == "scalenorm" else size,), False)
    if model.norm == "layernorm":
        yield Parameter(f"{name}.bias", (size,), False)


def _norm_kept(
    model: ModelSection,
    size: int | None = None,
    *,
    divided: bool = False,
    needed_by: tuple[str, ...] = (),
    weight: str | None = None,
) -> Iterator[Kept]:
    """What norms keep beside their input: layernorm two numbers, rmsnorm one, in kernels of one piece.

    scalenorm has no such kernel, rmsnorm none on a CPU: what is multiplied with the weight is kept as well, and in half
    precision the fp32 copy of the input.
    """
    size = size or model.hidden_size
    where: dict[str, Any] = {"divided": divided, "over_tokens": not divided, "in_attention": divided}
    where["needed_by"] = needed_by
    by_weight = {**where, "needed_by": (weight,) if weight else needed_by}
    heads = model.num_attention_heads + model.num_kv_heads if divided else 1
    numbers = 2 if "layernorm" in model.norm else 1
    yield Kept("norm's statistics", numbers * heads, word=4, **where)
    if model.norm in ("rmsnorm", "scalenorm"):
        device = "cpu" if model.norm == "rmsnorm" else None
        yield Kept("normed input before the weight", size * heads, only_on=device, **by_weight)
        yield Kept("norm's input in fp32", size * heads, word=4, only_on=device, only_half=True, **where)


def _dropout_kept(model: ModelSection, what: str, size: int, needed_by: tuple[str, ...] = ()) -> Iterator[Kept]:
    """The mask: a byte per element on a GPU, a factor on a CPU."""
    if model.hidden_dropout:
        yield Kept(what, size, over_tokens=True, word=1, only_on="cuda", needed_by=needed_by)
        yield Kept(what, size, over_tokens=True, only_on="cpu", needed_by=needed_by)


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


def _attention_kept(model: ModelSection, tp: int, has_window: bool) -> Iterator[Kept]:
    heads = model.num_attention_heads
    # A rank works with its part of the kv heads, and with at least one, which it may share with others.
    width, kv_width = heads * model.head_dim, max(model.num_kv_heads, tp) * model.head_dim
    is_fused, turns = model.num_kv_heads == heads, model.pos_emb == "rotary"
    # Rotation and head norms make new queries and keys. Of the old ones stays what shares its memory with the values,
    # and what a head norm's backward pass reads.
    size = 3 * width if is_fused else 2 * kv_width + (width if model.use_qk_layernorm or not turns else 0)
    if turns or model.use_qk_layernorm:
        size += width + kv_width
    where: dict[str, Any] = {"divided": True, "in_attention": True, "needed_by": ("attended",)}
    yield Kept("queries, keys, values", size, **where)
    yield Kept("softmax's normaliser", heads, word=4, **where)
    if model.use_qk_layernorm:
        yield from _norm_kept(model, model.head_dim, divided=True, needed_by=("attended",))
    yield from _scores_kept(model, 0 if is_fused else 2 * (width - kv_width), has_window)
    # Attention's own backward pass reads its result as well.
    yield Kept("attended values", width, divided=True, needed_by=("attended", "dense's weight"))


def _scores_kept(model: ModelSection, expansion: int, has_window: bool) -> Iterator[Kept]:
    """What torch's attention keeps on a CPU when sight is limited or biased; kernels for GPUs make it as they go.

    expansion: elements by which keys and values grow when every query head gets its own.
    """
    sequence, heads = model.seq_length, model.num_attention_heads
    where: dict[str, Any] = {"in_attention": True, "only_on": "cpu", "needed_by": ("attended",)}
    if model.attention_dropout:
        yield Kept("attention probabilities and their dropout", 2 * heads * sequence, divided=True, **where)
    if model.pos_emb == "rpe":
        # A bias that learns takes the path without a kernel.
        yield Kept("attention probabilities", heads * sequence, divided=True, **where)
        yield Kept("buckets of distances", sequence, of_batch=True, word=8, **where)
    elif model.pos_emb == "alibi":
        yield Kept("bias of the scores", heads * sequence, divided=True, of_batch=True, **where)
    elif has_window:
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
    widths = ACTIVATION_WIDTHS[model.activation] - 1
    # relu's derivative follows from its result.
    by_result = ("inner", "linear2's weight") if widths == 0 else ("linear2's weight",)
    yield Kept("the non-linearity's result", model.ffn_size, divided=True, needed_by=by_result)
    yield Kept("what makes it", widths * model.ffn_size, divided=True, needed_by=("inner",))


def _feed_forward_flops(model: ModelSection) -> Iterator[tuple[str, int]]:
    yield "feed_forward", 2 * model.hidden_size * model.ffn_size * (3 if model.is_gated else 2)
