"""`check_replicas: N`: every N steps the copies that ranks hold of one tensor are compared, bit by bit.

    kind             over              tensors                              when
    weight           dp                all                                  before and after the step
                     tp, tied stages   replicated ones; the tied embedding  before and after the step
    master, moments  tp, tied stages   replicated ones; the tied embedding  after the step
    gradient         tp, tied stages   replicated ones; the tied embedding  as the optimizer takes it

A gradient is seen when it is averaged over dp, unscaled and clipped. Over dp there are no replicas of masters, moments
and reduced gradients to compare: ZeRO keeps every element of them on one rank, which alone steps it; what it made of
them is seen in the weights. (ZeRO 3 keeps no whole weights either, so nothing is compared over dp.) Each tensor is
reduced to a 64-bit checksum that can be added up from fragments, so nothing is gathered but one small vector per group.
Invariant: all ranks raise, or none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint.piece import Piece
from megatron.common.errors import ReplicaError
from megatron.engine.gradients import gradient_pieces, master_pieces
from megatron.engine.state import export_pieces
from megatron.engine.train_engine import TrainEngine
from megatron.model.build import WORD_EMBEDDING
from megatron.parallel.sharding import get_shard_spec

_BEFORE = "weight before the step"
_SAME_SIZE_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK_ELEMENTS = 1 << 20
_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as a signed number
_SHOWN = 5

Key = tuple[str, str]  # kind, name


@dataclass(frozen=True)
class Difference:
    """One tensor of which the ranks of a group hold several versions; each inner list holds the ranks that agree."""

    kind: str
    name: str
    axis: str
    ranks: list[list[int]]

    def __str__(self) -> str:
        versions = " | ".join(", ".join(map(str, ranks)) for ranks in self.ranks)
        return f"{self.name} ({self.kind}) differs over {self.axis}: ranks {versions}"


class ReplicaCheck:
    """Compares replicas around every `interval`-th step. Building one, and every check, is collective over all
    ranks."""

    def __init__(self, engine: TrainEngine, interval: int) -> None:
        """interval: in optimizer steps; 0 never checks."""
        self.engine, self.interval = engine, interval
        self._before: dict[Key, torch.Tensor] = {}
        self._gradients: dict[Key, torch.Tensor] = {}
        self._masters: list[Piece] = []
        self._is_replicated = {name: get_shard_spec(p).dim is None for name, p in engine.named_parameters}
        self._is_watching = False
        self._tied: dist.ProcessGroup | None = None
        if interval and engine.is_staged and engine.spec.tied_head:
            self._tied = _first_and_last_stage(engine)
        if interval:
            engine.deepspeed.optimizer.optimizer.register_step_pre_hook(self._see_gradients)

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Make optimizer step `step` (from 1) within; if it is due, the replicas are compared behind it.

        Raises: ReplicaError on every rank, with the tensors, the ranks and the step.
        """
        if not self.interval or step % self.interval:
            yield
            return
        self._before, self._gradients = self._weights(_BEFORE), {}
        self._masters = master_pieces(self.engine)
        self._is_watching = True
        try:
            yield
        finally:
            self._is_watching = False
        self.compare(step)

    @torch.no_grad()
    def compare(self, step: int) -> None:
        """Compare now. Collective. Raises: ReplicaError on every rank."""
        groups = self.engine.groups
        weights = self._before | self._weights("weight")
        # A skipped step shows the optimizer no gradient: on all ranks alike, for they agreed to skip.
        fragments = self._gradients | self._states()
        _add_up(fragments, groups.dp)
        found = _compare(weights, groups.dp, "dp")
        everything = weights | fragments
        shared = {key: value for key, value in everything.items() if self._is_replicated[key[1]]}
        found += _compare(shared, groups.tp, "tp")
        tied = {key: value for key, value in everything.items() if key[1].startswith(f"{WORD_EMBEDDING}.")}
        found += _compare(tied, self._tied, "the tied stages")
        self._raise_together(step, found)

    def _weights(self, kind: str) -> dict[Key, torch.Tensor]:
        # ZeRO 3 leaves empty tensors where it has divided a weight.
        return {(kind, name): checksum(p) for name, p in self.engine.named_parameters if p.numel()}

    def _states(self) -> dict[Key, torch.Tensor]:
        """Of this rank's fragments of masters and of the optimizer's moments."""
        states: dict[Key, torch.Tensor] = {}
        for piece in export_pieces(self.engine):
            states["master" if piece.kind == "weight" else piece.kind, piece.name] = checksum(piece.tensor, piece.start)
        # A rank whose partition is all padding has no fragments, and must bring as many numbers as the others.
        kinds: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(kinds, sorted({kind for kind, _ in states}))
        return self._complete(states, sorted({kind for of_rank in kinds for kind in of_rank}))

    def _complete(self, fragments: dict[Key, torch.Tensor], kinds: list[str]) -> dict[Key, torch.Tensor]:
        """An entry for every tensor of the stage, in one order on all ranks: 0 where this rank has no fragment."""
        zero = torch.zeros((), dtype=torch.int64)
        keys = [(kind, name) for kind in kinds for name, _ in self.engine.named_parameters]
        return {key: fragments.get(key, zero).to(self.engine.device) for key in keys}

    def _see_gradients(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch at the head of the optimizer's own step; ZeRO may make one call per parameter group."""
        if not self._is_watching:
            return
        seen = {
            ("gradient", piece.name): checksum(gradient, piece.start).to(self.engine.device)
            for piece, gradient in gradient_pieces(optimizer, self._masters)
        }
        self._gradients = self._complete(self._gradients, ["gradient"]) | seen

    def _raise_together(self, step: int, found: list[Difference]) -> None:
        verdict = torch.tensor(len(found), dtype=torch.int64, device=self.engine.device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX)
        if not int(verdict):
            return
        everyone: list[list[Difference]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, sorted(found, key=_cause)[: 20 * _SHOWN])
        # A gradient that differs makes its master, its moments and its weight differ: the first of them is enough.
        first: dict[tuple[str, str], Difference] = {}
        for difference in sorted((d for differences in everyone for d in differences), key=_cause):
            first.setdefault((difference.name, difference.axis), difference)
        lines = list(map(str, first.values()))
        more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise ReplicaError(
            f"check_replicas: at step {step} ranks hold different copies of what must be one tensor (ranks that agree "
            "stand together):\n  " + "\n  ".join(lines[:_SHOWN]) + more + "\nNothing of this step was saved. Continue "
            "from the newest checkpoint; if it comes again on other hosts, report it with the configuration, and if "
            "it stays with one rank, suspect that host's hardware."
        )


def _cause(difference: Difference) -> int:
    """Where the kind stands in the order of a step."""
    order = [_BEFORE, "gradient", "master"]
    return order.index(difference.kind) if difference.kind in order else len(order)


def checksum(tensor: torch.Tensor, start: int = 0) -> torch.Tensor:
    """A 64-bit checksum of the bits of a flattened tensor, or of its elements from `start` on.

    The checksums of disjoint fragments add up (modulo 2**64) to that of the whole. One changed element is always
    seen: its bits are multiplied by an odd number that depends on the position.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.as_strided(flat.shape, (1,)).view(_SAME_SIZE_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for begin in range(0, bits.numel(), _CHUNK_ELEMENTS):
        chunk = bits[begin : begin + _CHUNK_ELEMENTS].long()
        factors = torch.arange(start + begin + 1, start + begin + 1 + chunk.numel(), device=tensor.device)
        factors.mul_(_GOLDEN)
        factors.bitwise_xor_(factors >> 29).mul_(_GOLDEN).bitwise_or_(1)
        total += (chunk * factors).sum()
    return total


def _add_up(fragments: dict[Key, torch.Tensor], group: dist.ProcessGroup | None) -> None:
    if group is None or not fragments:
        return
    total = torch.stack(list(fragments.values()))
    dist.all_reduce(total, group=group)
    fragments.update(zip(fragments, total.unbind(), strict=True))


def _compare(values: dict[Key, torch.Tensor], group: dist.ProcessGroup | None, axis: str) -> list[Difference]:
    """What differs between the ranks of the group; all hold the same keys in the same order. Collective."""
    if group is None or not values:
        return []
    own = torch.stack(list(values.values()))
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    table = torch.stack(every)
    differing = (table != table[0]).any(0).nonzero().flatten().tolist()
    ranks, keys = dist.get_process_group_ranks(group), list(values)
    return [_difference(keys[column], axis, ranks, table[:, column].tolist()) for column in differing]


def _difference(key: Key, axis: str, ranks: list[int], sums: list[int]) -> Difference:
    versions: dict[int, list[int]] = {}
    for rank, value in zip(ranks, sums, strict=True):
        versions.setdefault(value, []).append(rank)
    return Difference(*key, axis, sorted(versions.values(), key=lambda ranks: (-len(ranks), ranks)))


def _first_and_last_stage(engine: TrainEngine) -> dist.ProcessGroup | None:
    """This rank's group of the two stages that hold the tied embedding; None in between. Collective."""
    mine = None
    for line in engine.groups.topology.groups("pp"):
        group = dist.new_group([line[0], line[-1]])
        if engine.groups.global_rank in (line[0], line[-1]):
            mine = group
    return mine
