"""The model's fp32 master weights and optimizer state as named pieces of logical tensors, out of and into DeepSpeed.

Reads DeepSpeed's bookkeeping of which part of a parameter this rank's flat fp32 partition holds: `_hp_mapping` for
ZeRO 1 and 2, `grad_position` for ZeRO 3. Not here: files (megatron.checkpoint).
Invariant: the pieces of all ranks cover every logical tensor exactly once per kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron.checkpoint.piece import Piece
from megatron.engine.train_engine import TrainEngine
from megatron.parallel.sharding import get_shard_spec

WEIGHT = "weight"


class TensorSource(Protocol):
    """What loading needs of a checkpoint: byte ranges of one tensor-parallel shard, at any layout."""

    def names(self) -> list[str]: ...

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
        is_divided: bool | None = None,
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Place:
    """Where this rank keeps its part of a parameter.

    The elements [start, start + numel) of the flattened tensor-parallel shard lie in `flat` from `begin` on.
    """

    flat: torch.Tensor
    begin: int
    start: int
    numel: int

    @property
    def stop(self) -> int:
        """One past the last element of the shard that is held here."""
        return self.start + self.numel

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The part of a tensor that is laid out as `flat` is: the masters themselves, or an optimizer state."""
        return flat.narrow(0, self.begin, self.numel)


def place(engine: TrainEngine, parameter: torch.nn.Parameter) -> Place | None:
    """Where this rank keeps its part of a parameter, or None if other data-parallel ranks hold all of it.

    Of a frozen parameter, which has no fp32 master, that is the weight itself; without ZeRO 3 the first replica's.
    """
    if not parameter.requires_grad:
        return _frozen_place(engine, parameter)
    if engine.is_fully_sharded:
        group, begin, _ = engine.deepspeed.optimizer.grad_position[parameter.ds_id]  # type: ignore[attr-defined]
        start, numel = _partition(engine, parameter)
        flat = engine.deepspeed.optimizer.fp32_partitioned_groups_flat[group]
        return Place(flat, begin, start, numel) if numel else None
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    (flat,) = _inner_optimizer(engine).param_groups[mapping.param_group_index]["params"]
    held, lies = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Place(flat, lies.start, held.start, held.numel)


def _partition(engine: TrainEngine, parameter: torch.nn.Parameter) -> tuple[int, int]:
    """(first element, number of elements) of the shard that ZeRO 3 keeps on this rank."""
    width = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    start = engine.groups.dp_rank * width
    return start, max(0, min(width, parameter.ds_numel - start))  # type: ignore[attr-defined]


def _frozen_place(engine: TrainEngine, parameter: torch.nn.Parameter) -> Place | None:
    if engine.is_fully_sharded:
        start, numel = _partition(engine, parameter)
        flat = parameter.ds_tensor.detach()  # type: ignore[attr-defined]
        return Place(flat.flatten(), 0, start, numel) if numel else None
    if engine.groups.dp_rank:
        return None
    return Place(parameter.detach().flatten(), 0, 0, parameter.numel())


def export_pieces(engine: TrainEngine) -> Iterator[Piece]:
    """This rank's fragments: master weights, and every per-element optimizer state that exists.

    A tied weight that two pipeline stages hold is written by the first and marked a replica on the last.
    """
    groups = engine.groups
    last_stage_of_many = engine.is_staged and groups.at.pp_rank > 0
    for name, parameter in engine.named_parameters:
        at = place(engine, parameter)
        if at is None:
            continue
        is_tied_copy = last_stage_of_many and engine.spec.tied_head and name.startswith("embedding.word_embeddings")
        for kind, flat in {WEIGHT: at.flat, **_states_like(engine, at.flat)}.items():
            yield Piece(
                name,
                kind,
                get_shard_spec(parameter),
                groups.tp_rank,
                groups.tp_size,
                at.start,
                at.stop,
                at.of(flat).detach(),
                replica=is_tied_copy,
            )


def optimizer_steps(engine: TrainEngine) -> int:
    """How many steps the optimizer has made (Adam's bias correction counts them; overflowed steps do not count)."""
    for state in _inner_optimizer(engine).state.values():
        if "step" in state:
            return int(state["step"])
    return 0


@torch.no_grad()
def import_weights(
    engine: TrainEngine, source: TensorSource, keeps: Callable[[str], bool] = lambda name: False
) -> None:
    """Load the weights: this rank's shards in the training dtype, and the fp32 masters that follow them.

    keeps: parameters that stay as they are, because the source does not have them.
    """
    groups = engine.groups
    for name, parameter in engine.named_parameters:
        if keeps(name):
            continue
        shard = source.read_shard(name, WEIGHT, groups.tp_rank, groups.tp_size, **_wanted(parameter))
        if parameter.numel() == shard.numel():
            parameter.copy_(shard.view(parameter.shape))
        at = place(engine, parameter)
        if at is None:
            continue
        part = shard.flatten()[at.start : at.stop]
        at.of(at.flat).copy_(part)
        if engine.is_fully_sharded:
            parameter.ds_tensor.narrow(0, 0, at.numel).copy_(part)  # type: ignore[attr-defined]


@torch.no_grad()
def import_optimizer(engine: TrainEngine, source: TensorSource, steps: int) -> None:
    """Load the optimizer's per-element state and set its step count, of an optimizer that counts (0: it does not).

    A checkpoint from before the first step holds no states: the optimizer then starts anew.
    """
    groups, optimizer = engine.groups, _inner_optimizer(engine)
    # Of all tensors: nothing of this stage may learn but its fillers, which have the states that the others have.
    found = {kind for name in source.names() for kind in source.kinds(name)} - {WEIGHT}
    for name, parameter in engine.named_parameters:
        kinds = [kind for kind in source.kinds(name) if kind != WEIGHT]
        at = place(engine, parameter)
        if at is None or not parameter.requires_grad:
            continue
        state = optimizer.state[at.flat]
        for kind in kinds:
            if not torch.is_tensor(state.get(kind)):
                state[kind] = torch.zeros_like(at.flat)
            part = source.read_shard(
                name, kind, groups.tp_rank, groups.tp_size, at.start, at.stop, **_wanted(parameter)
            )
            at.of(state[kind]).copy_(part.flatten())
    for flat in _flat_partitions(engine):
        state = optimizer.state[flat]
        if not found:
            state.clear()
        if steps:
            state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=flat.device)
        # A partition of padding alone (a stage filler) has no piece in any checkpoint.
        for kind in found:
            state.setdefault(kind, torch.zeros_like(flat))


def _wanted(parameter: torch.nn.Parameter) -> dict[str, Any]:
    # A checkpoint of another tensor-parallel size may hold another number of padding rows, and may have divided the
    # keys and values that this one shares, or shared those that this one divides.
    spec = get_shard_spec(parameter)
    return {"rows": spec.logical_shape[0], "is_divided": spec.dim is not None}


def _inner_optimizer(engine: TrainEngine) -> torch.optim.Optimizer:
    return engine.deepspeed.optimizer.optimizer


def _flat_partitions(engine: TrainEngine) -> list[torch.Tensor]:
    if engine.is_fully_sharded:
        return list(engine.deepspeed.optimizer.fp32_partitioned_groups_flat)
    return [flat for group in _inner_optimizer(engine).param_groups for flat in group["params"]]


def _states_like(engine: TrainEngine, flat: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        kind: value
        for kind, value in _inner_optimizer(engine).state.get(flat, {}).items()
        if torch.is_tensor(value) and value.shape == flat.shape
    }
