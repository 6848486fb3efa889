"""Upstream's GPT-NeoX checkpoints in terms of ours: names of tensors, and how tensor-parallel shards make them up.

Pure functions on tensors; files are `neox_files.py`'s. Invariant: `logical_tensor` over the shards that `layer_shard`
gives returns every tensor bit by bit (biases that upstream sums over ranks up to the rounding of a division by TP).
Source: GPT-NeoX's state_dict of one layer as written from 2021 to 2025, tools/ckpts/merge20b.py for what is summed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from megatron.common.errors import CheckpointError
from megatron.model.spec import ModelSpec

# How grouped-query attention lays out the rows of query_key_value on one tensor-parallel rank:
# blocks: all queries, all keys, all values (since November 2024); per_head: for each query head its query rows and its
# share of the key and value rows of its group (before).
GroupedLayout = Literal["blocks", "per_head"]
# (layer, names to look for, best first) -> that tensor's shards by tensor-parallel rank; empty where no name is known.
Shards = Callable[[int, Sequence[str]], list[torch.Tensor]]
# Our name -> the whole logical tensor.
Whole = Callable[[str], torch.Tensor]

_BUFFERS = ("rotary_emb.inv_freq", "alibi_embed.slopes", "position_embeddings.inv_freq", "_extra_state")
_NORM_WEIGHT = ("weight", "scale", "g", "norm.weight")
_LINEAR1, _LINEAR2 = ("mlp.linear1", "mlp.dense_h_to_4h"), ("mlp.linear2", "mlp.dense_4h_to_h", "mlp.w2")
_BLOCK_OFFSET = 2


def place(spec: ModelSpec, name: str) -> tuple[int, str]:
    """Upstream's layer number, and the rest of our name: blocks are 2 to L+1, L+3 is the norm, L+4 the head."""
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        return int(match.group(1)) + _BLOCK_OFFSET, match.group(2)
    fixed = {"embedding": 0, "final_norm": spec.num_layers + 3, "head": spec.num_layers + 4}
    first, _, rest = name.partition(".")
    return fixed[first], name if first == "head" else rest if first == "embedding" else f"norm.{rest}"


def layers_with_tensors(spec: ModelSpec) -> list[int]:
    """The layer numbers that a checkpoint of this model holds."""
    blocks = range(_BLOCK_OFFSET, spec.num_layers + _BLOCK_OFFSET)
    return [0, *blocks, spec.num_layers + 3, *([] if spec.tied_head else [spec.num_layers + 4])]


def logical_tensor(spec: ModelSpec, name: str, stored: Shards, grouped: GroupedLayout) -> torch.Tensor:
    """Put our tensor `name` together out of upstream's shards.

    Raises: CheckpointError for a tensor that is not stored, or a shard of a size that the model cannot have.
    """
    layer, rest = place(spec, name)

    def shards(layer: int, names: Sequence[str]) -> list[torch.Tensor]:
        if found := stored(layer, names):
            return found
        raise CheckpointError(f"layer {layer} holds no {names[0]}")

    module, _, leaf = rest.rpartition(".")
    if "norm" in module:
        return _replicated(shards(layer, [f"{module}.{n}" for n in (_NORM_WEIGHT if leaf == "weight" else ("bias",))]))
    if module == "head":
        return torch.cat(shards(layer, ["final_linear.weight"]))
    if module in ("mlp.gate", "mlp.up"):
        return _gated_part(module == "mlp.gate", leaf, layer, stored, shards)
    if module in ("attention.query", "attention.key_value"):
        parts = [_query_and_key_value(spec, s, grouped) for s in shards(layer, [f"attention.query_key_value.{leaf}"])]
        return torch.cat([part[module == "attention.key_value"] for part in parts])
    if module in ("attention.dense", "mlp.linear2"):
        names = [f"{n}.{leaf}" for n in (_LINEAR2 if module == "mlp.linear2" else (module,))]
        return torch.cat(shards(layer, names), 1) if leaf == "weight" else _row_bias(spec, shards(layer, names))
    if module == "position_embeddings" or "norm" in rest:
        return _replicated(shards(layer, [rest]))
    names = [f"{n}.{leaf}" for n in (_LINEAR1 if module == "mlp.linear1" else (module,))]
    return torch.cat(shards(layer, names))


def is_foreign(spec: ModelSpec, layer: int, key: str) -> bool:
    """Whether a stored tensor belongs to no part of the model: neither a parameter of it nor a constant buffer."""
    if key.endswith(_BUFFERS):
        return False
    # A tied head of a pipeline is the embedding once more.
    if spec.tied_head and layer == spec.num_layers + 4:
        layer = 0
    if layer not in layers_with_tensors(spec):
        return True
    if layer == 0:
        return key != "word_embeddings.weight" and (spec.position != "learned" or key != "position_embeddings.weight")
    in_norm = (*_NORM_WEIGHT, *(["bias"] if spec.norm == "layernorm" else []))
    if layer >= spec.num_layers + 3:
        norms = {f"norm.{leaf}" for leaf in in_norm}
        return key not in (norms if layer == spec.num_layers + 3 else {"final_linear.weight"})
    biased = {
        "attention.query_key_value": spec.qkv_bias,
        "attention.dense": spec.attention_bias,
        **dict.fromkeys((*_LINEAR1, *_LINEAR2, "mlp.w1", "mlp.w3"), spec.mlp_bias),
    }
    # With gpt_j_tied, a post_attention_layernorm is stored that no one reads.
    norms = {f"{n}.{x}" for n in ("input_layernorm", "post_attention_layernorm") for x in in_norm}
    known = {f"{m}.weight" for m in biased} | {f"{m}.bias" for m, has in biased.items() if has} | norms
    return key not in known


def layer_shard(
    spec: ModelSpec, layer: int, tp_rank: int, tp_size: int, whole: Whole
) -> Iterator[tuple[str, torch.Tensor]]:
    """Upstream's state_dict of one layer on one tensor-parallel rank, under today's names, GQA in blocks.

    Raises: CheckpointError if heads or features do not divide over the ranks.
    """

    def rows(name: str) -> torch.Tensor:
        return _share(whole(name), name, 0, tp_rank, tp_size)

    if layer == 0:
        yield "word_embeddings.weight", rows("embedding.word_embeddings.weight")
        if spec.position == "learned":
            yield "position_embeddings.weight", whole("embedding.position_embeddings.weight")
        return
    if layer == spec.num_layers + 4:
        yield "final_linear.weight", rows("head.weight")
        return
    if layer == spec.num_layers + 3:
        yield from _norm(spec, "norm", "final_norm", whole)
        return
    block = f"layers.{layer - _BLOCK_OFFSET}."
    yield from _norm(spec, "input_layernorm", f"{block}input_layernorm", whole)
    # gpt_j_tied: upstream stores the second norm although both halves read the first.
    second = "input_layernorm" if spec.residual == "parallel_tied" else "post_attention_layernorm"
    yield from _norm(spec, "post_attention_layernorm", block + second, whole)
    for leaf, is_there in (("weight", True), ("bias", spec.attention_bias)):
        if is_there:
            # Upstream has one switch for the biases of both.
            yield f"attention.query_key_value.{leaf}", _query_key_value(spec, block, leaf, tp_rank, tp_size, whole)
            yield _row_parallel(spec, "attention.dense", block, leaf, tp_rank, tp_size, whole)
    for leaf, is_there in (("weight", True), ("bias", spec.mlp_bias)):
        if is_there:
            halves = ("up", "gate") if spec.is_gated else ("linear1",)
            yield f"mlp.linear1.{leaf}", torch.cat([rows(f"{block}mlp.{half}.{leaf}") for half in halves])
            yield _row_parallel(spec, "mlp.linear2", block, leaf, tp_rank, tp_size, whole)


def _norm(spec: ModelSpec, theirs: str, ours: str, whole: Whole) -> Iterator[tuple[str, torch.Tensor]]:
    if spec.norm == "rmsnorm":
        yield f"{theirs}.scale", whole(f"{ours}.weight")
    else:
        yield from ((f"{theirs}.{leaf}", whole(f"{ours}.{leaf}")) for leaf in ("weight", "bias"))


def _row_parallel(
    spec: ModelSpec, module: str, block: str, leaf: str, tp_rank: int, tp_size: int, whole: Whole
) -> tuple[str, torch.Tensor]:
    name = f"{block}{module}.{leaf}"
    if leaf == "weight":
        return f"{module}.weight", _share(whole(name), name, 1, tp_rank, tp_size)
    return f"{module}.bias", whole(name) / tp_size if spec.residual != "sequential" else whole(name)


def _query_key_value(spec: ModelSpec, block: str, leaf: str, tp_rank: int, tp_size: int, whole: Whole) -> torch.Tensor:
    if spec.num_kv_heads == spec.num_heads:
        name = f"{block}attention.query_key_value.{leaf}"
        return _share(whole(name), name, 0, tp_rank, tp_size)
    query, pairs = (whole(f"{block}attention.{part}.{leaf}") for part in ("query", "key_value"))
    pairs = pairs.unflatten(0, (spec.num_kv_heads, 2, spec.head_dim))
    parts = (query, *(half.flatten(0, 1) for half in pairs.unbind(1)))
    return torch.cat([_share(part, f"{block}attention", 0, tp_rank, tp_size) for part in parts])


def _share(tensor: torch.Tensor, name: str, dim: int, tp_rank: int, tp_size: int) -> torch.Tensor:
    if tensor.shape[dim] % tp_size:
        raise CheckpointError(
            f"{name}: {tensor.shape[dim]} do not divide over {tp_size} tensor-parallel ranks. Use fewer."
        )
    return tensor.chunk(tp_size, dim)[tp_rank]


def _replicated(copies: list[torch.Tensor]) -> torch.Tensor:
    """The mean of the ranks' copies, as upstream's own mergers take it; the first where they are the same."""
    if all(torch.equal(copies[0], other) for other in copies[1:]):
        return copies[0]
    return torch.stack([copy.float() for copy in copies]).mean(0).to(copies[0].dtype)


def _row_bias(spec: ModelSpec, shards: list[torch.Tensor]) -> torch.Tensor:
    """With a parallel residual each rank adds its own bias before the reduction, so that their sum is what counts."""
    if spec.residual == "sequential" or len(shards) == 1:
        return _replicated(shards)
    return torch.stack([shard.float() for shard in shards]).sum(0)


def _gated_part(is_gate: bool, leaf: str, layer: int, stored: Shards, shards: Shards) -> torch.Tensor:
    """linear1 holds [up; gate] on each rank; older Llama checkpoints hold w1 (gate) and w3 (up)."""
    if apart := stored(layer, [f"mlp.{'w1' if is_gate else 'w3'}.{leaf}"]):
        return torch.cat(apart)
    halves = [shard.chunk(2) for shard in shards(layer, [f"{name}.{leaf}" for name in _LINEAR1])]
    return torch.cat([half[1 if is_gate else 0] for half in halves])


def _query_and_key_value(
    spec: ModelSpec, shard: torch.Tensor, grouped: GroupedLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """One rank's rows -> (queries [heads, D], key and value pairs [kv heads, 2, D]), flattened over the first dims."""
    width = spec.head_dim * (spec.num_heads + 2 * spec.num_kv_heads)
    if shard.shape[0] * spec.num_heads % width:
        raise CheckpointError(f"query_key_value has {shard.shape[0]} rows on a rank; the model's {width} do not divide")
    heads = shard.shape[0] * spec.num_heads // width
    kv_heads = heads * spec.num_kv_heads // spec.num_heads
    sizes = [heads * spec.head_dim, kv_heads * spec.head_dim, kv_heads * spec.head_dim]
    if grouped == "blocks":
        query, key, value = shard.split(sizes)
    else:
        rows = shard.unflatten(0, (heads, -1))
        query, key, value = (part.flatten(0, 1) for part in rows.split([size // heads for size in sizes], 1))
    pairs = [part.unflatten(0, (kv_heads, spec.head_dim)) for part in (key, value)]
    return query, torch.stack(pairs, 1).flatten(0, 2)
