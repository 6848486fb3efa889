"""The model's fp32 master weights and optimizer state as named pieces of logical tensors, out of and into DeepSpeed.

Reads DeepSpeed's ZeRO-1/2 bookkeeping (`_hp_mapping`: which part of a parameter lies where in the flat fp32 partition
of this rank). Not here: files (megatron.checkpoint). Invariant: the pieces of all ranks cover every logical tensor
exactly once per kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from megatron.checkpoint.piece import Piece
from megatron.engine.train_engine import TrainEngine
from megatron.parallel.sharding import get_shard_spec

WEIGHT = "weight"


class TensorSource(Protocol):
    """What loading needs of a checkpoint: byte ranges of one tensor-parallel shard, at any layout."""

    def kinds(self, name: str) -> list[str]: ...

    def read_shard(
        self,
        name: str,
        kind: str,
        tp_rank: int,
        tp_size: int,
        start: int = 0,
        stop: int | None = None,
        *,
        rows: int | None = None,
    ) -> torch.Tensor: ...


def export_pieces(engine: TrainEngine) -> Iterator[Piece]:
    """This rank's fragments: master weights, and every per-element optimizer state that exists.

    A tied weight that two pipeline stages hold is written by the first and marked a replica on the last.
    """
    groups = engine.groups
    last_stage_of_many = engine.is_staged and groups.at.pp_rank > 0
    for name, parameter in engine.named_parameters:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue
        start = mapping.lp_fragment_address.start
        stop = start + mapping.lp_fragment_address.numel
        is_tied_copy = last_stage_of_many and engine.spec.tied_head and name.startswith("embedding.word_embeddings")
        fragments = {WEIGHT: mapping.hp_fragment, **_optimizer_fragments(engine, mapping)}
        for kind, tensor in fragments.items():
            yield Piece(
                name,
                kind,
                get_shard_spec(parameter),
                groups.tp_rank,
                groups.tp_size,
                start,
                stop,
                tensor.detach(),
                replica=is_tied_copy,
            )


def optimizer_steps(engine: TrainEngine) -> int:
    """How many steps the optimizer has made (Adam's bias correction counts them; overflowed steps do not count)."""
    for state in _inner_optimizer(engine).state.values():
        if "step" in state:
            return int(state["step"])
    return 0


@torch.no_grad()
def import_weights(engine: TrainEngine, source: TensorSource) -> None:
    """Load the weights: this rank's shards in the training dtype, and the fp32 masters that follow them."""
    groups = engine.groups
    for name, parameter in engine.named_parameters:
        shard = source.read_shard(name, WEIGHT, groups.tp_rank, groups.tp_size, rows=_rows(parameter))
        parameter.copy_(shard.view(parameter.shape))
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            address = mapping.lp_fragment_address
            mapping.hp_fragment.copy_(shard.flatten()[address.start : address.start + address.numel])


@torch.no_grad()
def import_optimizer(engine: TrainEngine, source: TensorSource, steps: int) -> None:
    """Load the optimizer's per-element state and set its step count."""
    groups, optimizer = engine.groups, _inner_optimizer(engine)
    if steps == 0:
        return
    for group in optimizer.param_groups:
        for flat in group["params"]:
            optimizer.state[flat]["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
    for name, parameter in engine.named_parameters:
        mapping = getattr(parameter, "_hp_mapping", None)
        if mapping is None:
            continue
        flat = _flat_partition(engine, mapping)
        begin, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
        start = mapping.lp_fragment_address.start
        for kind in source.kinds(name):
            if kind == WEIGHT:
                continue
            state = optimizer.state[flat]
            if kind not in state:
                state[kind] = torch.zeros_like(flat)
            fragment = source.read_shard(
                name, kind, groups.tp_rank, groups.tp_size, start, start + numel, rows=_rows(parameter)
            )
            state[kind].narrow(0, begin, numel).copy_(fragment.flatten())


def _rows(parameter: torch.nn.Parameter) -> int:
    # A checkpoint of another tensor-parallel size may hold another number of padding rows.
    return get_shard_spec(parameter).logical_shape[0]


def _inner_optimizer(engine: TrainEngine) -> torch.optim.Optimizer:
    return engine.deepspeed.optimizer.optimizer


def _flat_partition(engine: TrainEngine, mapping: Any) -> torch.Tensor:
    (flat,) = _inner_optimizer(engine).param_groups[mapping.param_group_index]["params"]
    return flat


def _optimizer_fragments(engine: TrainEngine, mapping: Any) -> dict[str, torch.Tensor]:
    flat = _flat_partition(engine, mapping)
    begin, numel = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
    return {
        kind: value.narrow(0, begin, numel)
        for kind, value in _inner_optimizer(engine).state.get(flat, {}).items()
        if torch.is_tensor(value) and value.shape == flat.shape
    }
