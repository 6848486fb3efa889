"""Reading a checkpoint at any layout, from one process or many, without a process group.

The files are memory mapped and only the pages that a request touches are read. It builds no model and no optimizer.
Invariant: what is returned for (name, kind, layout) does not depend on the layout that wrote the checkpoint.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import manifest as manifests
from megatron.checkpoint.find import CheckpointPath, candidates
from megatron.checkpoint.layout import blocks, copy_overlap, fold
from megatron.checkpoint.location import ByteSource, Location, file_sizes, location
from megatron.checkpoint.piece import DTYPES, checksum
from megatron.common.errors import CheckpointError
from megatron.common.heartbeat import beat
from megatron.parallel.sharding import ShardSpec

# Verified in portions, so that a large tensor on object storage need not fit into memory.
_PORTION_BYTES = 1 << 26
# Gives all processes the texts of all, and lets none pass before all have come.
Share = Callable[[str], list[str]]


class Reader:
    """One complete checkpoint folder. `step`, `state`, `software` and `created` are what its manifest says."""

    def __init__(self, folder: str | Location | CheckpointPath) -> None:
        """Raises: CheckpointError if the folder is not complete (manifest, files and their sizes)."""
        if isinstance(folder, CheckpointPath):
            self.folder, self._manifest = folder.folder, folder.manifest
        else:
            self.folder = location(folder)
            self._manifest = manifests.load(self.folder)
        self.step: int = self._manifest["step"]
        self.state: dict[str, Any] = self._manifest["state"]
        self.software: dict[str, str] = self._manifest["software"]
        self.created: str = self._manifest["created"]
        self._sources: dict[int, ByteSource] = {}

    def names(self, kind: str = "weight") -> list[str]:
        """The tensors of which this kind is stored."""
        return [name for name, tensor in self._manifest["tensors"].items() if kind in tensor["kinds"]]

    def kinds(self, name: str) -> list[str]:
        """The kinds stored of one tensor."""
        return list(self._tensor(name)["kinds"])

    def spec(self, name: str) -> ShardSpec:
        """Logical shape and sharded dimension of a tensor."""
        tensor = self._tensor(name)
        return ShardSpec(tuple(tensor["shape"]), tensor["dim"])

    def used_rows(self, name: str) -> int | None:
        """Of a padded tensor, the leading rows that mean something; None where all do."""
        rows: int | None = self._tensor(name).get("used_rows")
        return rows

    def dtype(self, name: str, kind: str = "weight") -> torch.dtype:
        """The type in which a tensor is stored."""
        return DTYPES[self._kind(name, kind)["dtype"]]

    def source_files(self) -> dict[str, str]:
        """The configuration sources that the run was started from, by name."""
        folder = self.folder / manifests.configs_folder(self._manifest)
        return {name: (folder / name).read_bytes().decode() for name in self._manifest["configs"]}

    def read(
        self, name: str, kind: str = "weight", *, rows: int | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The whole logical tensor. `rows` and `dtype` as in `read_shard`.

        Shapes: the logical shape, with `rows` in place of its first dimension where given.
        """
        spec = self._target_spec(name, rows)
        flat = self.read_shard(name, kind, 0, 1, rows=rows, dtype=dtype)
        return flat.view(spec.logical_shape)

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
        dtype: torch.dtype | None = None,
        is_divided: bool | None = None,
    ) -> torch.Tensor:
        """The elements [start, stop) of the flattened shard `tp_rank` of `tp_size`, in memory of its own.

        rows: the first logical dimension that the caller has, where its vocabulary is padded otherwise; rows beyond the
        stored ones are zero. dtype: convert while copying. is_divided: whether the caller's ranks divide the tensor,
        where that depends on their number (few kv heads); None: as it is stored.
        Shapes: [stop - start]. Raises: CheckpointError for an unknown tensor or a shape that cannot be had.
        """
        spec, stored = self._target_spec(name, rows), self.spec(name)
        if is_divided is not None and is_divided != (spec.dim is not None):
            # Only along the first dimension, where the order of the elements is the same either way.
            spec = ShardSpec(spec.logical_shape, 0 if is_divided else None)
        entry = self._kind(name, kind)
        try:
            size = spec.shard_numel(tp_size)
        except ValueError as error:
            raise CheckpointError(f"{name} in {self.folder}: {error}. Use another model_parallel_size.") from error
        stop = size if stop is None else stop
        if not 0 <= start <= stop <= size:
            raise CheckpointError(f"{name}: elements {start} to {stop} were asked of a shard of {size}")
        is_extended = math.prod(spec.logical_shape) > math.prod(stored.logical_shape)
        make = torch.zeros if is_extended else torch.empty
        target = make(stop - start, dtype=dtype or DTYPES[entry["dtype"]])
        wanted = blocks(spec, tp_rank, tp_size, start, stop)
        itemsize = DTYPES[entry["dtype"]].itemsize
        for file, source_rank, piece_start, piece_stop, offset, _ in entry["pieces"]:
            beat()
            held = blocks(stored, source_rank, entry["tp_size"], piece_start, piece_stop)
            pairs = [(block, other) for block in wanted for other in held if block.meets(other)]
            if not pairs:
                continue
            spans = ((a * itemsize, b * itemsize) for block, other in pairs for a, b in other.spans(block))
            source = self._source(file).read_spans(offset, (piece_stop - piece_start) * itemsize, spans)
            typed = source.view(DTYPES[entry["dtype"]])
            for block, other in pairs:
                copy_overlap(target, block, typed, other)
        return target

    @property
    def num_bytes(self) -> int:
        """Size of its tensor files."""
        return sum(file["bytes"] for file in self._manifest["files"])

    @property
    def num_ranks(self) -> int:
        """Ranks of the run that wrote it."""
        return len(self._manifest["files"])

    def rank_tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """The small tensors that a rank of the writing run saved for itself; empty if there was no such rank."""
        all_ranks = self._manifest["rank_tensors"]
        found = {}
        for entry in all_ranks[rank] if rank < len(all_ranks) else []:
            dtype = DTYPES[entry["dtype"]]
            data = self._bytes(rank, entry["offset"], math.prod(entry["shape"]) * dtype.itemsize)
            if zlib.crc32(data.numpy().data) != entry["crc32"]:
                raise CheckpointError(f"{self._path(rank)}: {entry['name']} is damaged")
            found[entry["name"]] = data.view(dtype).view(entry["shape"]).clone()
        return found

    def verify(self, kinds: Collection[str] | None = None, part: int = 0, parts: int = 1) -> None:
        """Compare the stored bytes with their checksums; several processes may each take a part of the work.

        kinds: only pieces of these kinds; None is everything in the folder.
        Raises: CheckpointError naming the damaged file and the tensor in it.
        """
        for check in self._checks(kinds, part, parts):
            check()

    def damages(self) -> Iterator[str]:
        """As `verify`, but goes on behind a damage: a sentence for every damaged tensor and file."""
        for check in self._checks(None, 0, 1):
            try:
                check()
            except CheckpointError as error:
                yield str(error)

    def _checks(self, kinds: Collection[str] | None, part: int, parts: int) -> Iterator[Callable[[], object]]:
        for file, entry in enumerate(self._manifest["files"]):
            if file % parts == part:
                yield partial(self._compare_range, file, 0, entry["header_bytes"], entry["header_crc32"], "its header")
        work = [
            (file, offset, (stop - start) * DTYPES[kind["dtype"]].itemsize, crc32, f"tensor {name} ({kind_name})")
            for name, tensor in self._manifest["tensors"].items()
            for kind_name, kind in tensor["kinds"].items()
            if kinds is None or kind_name in kinds
            for file, _, start, stop, offset, crc32 in kind["pieces"]
        ]
        for file, offset, size, crc32, what in work[part::parts]:
            yield partial(self._compare_range, file, offset, size, crc32, what)
        for rank in range(part, len(self._manifest["rank_tensors"]), parts):
            yield partial(self.rank_tensors, rank)
        for name, crc32 in self._manifest["configs"].items() if part == 0 else ():
            yield partial(self._compare_config, name, crc32)

    def _compare_config(self, name: str, crc32: int) -> None:
        path = self.folder / manifests.configs_folder(self._manifest) / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if zlib.crc32(data) != crc32:
            raise CheckpointError(f"{path} is damaged: its checksum does not fit its content")

    def _compare_range(self, file: int, offset: int, size: int, crc32: int, what: str) -> None:
        value = 0
        for begin in range(offset, offset + size, _PORTION_BYTES):
            beat()
            portion = self._bytes(file, begin, min(_PORTION_BYTES, offset + size - begin))
            value = checksum(portion.numpy().data, value)
        if value != crc32:
            raise CheckpointError(f"{self._path(file)} is damaged: the checksum of {what} does not fit its content")

    def _target_spec(self, name: str, rows: int | None) -> ShardSpec:
        spec = self.spec(name)
        if rows is None or rows == spec.logical_shape[0]:
            return spec
        used = self._tensor(name).get("used_rows")
        if used is None or rows < used or fold(spec)[0] != 1:
            need = f"at least {used} rows" if used is not None else f"exactly {spec.logical_shape[0]} rows"
            raise CheckpointError(f"{name} in {self.folder} needs {need}, the model has {rows}")
        return ShardSpec((rows, *spec.logical_shape[1:]), spec.dim)

    def _tensor(self, name: str) -> dict[str, Any]:
        try:
            tensor: dict[str, Any] = self._manifest["tensors"][name]
        except KeyError:
            raise CheckpointError(f"{self.folder} holds no tensor {name}: it is of another model") from None
        return tensor

    def _kind(self, name: str, kind: str) -> dict[str, Any]:
        kinds = self._tensor(name)["kinds"]
        if kind not in kinds:
            raise CheckpointError(f"{self.folder} holds no {kind} of {name}, only {', '.join(kinds)}")
        entry: dict[str, Any] = kinds[kind]
        return entry

    def _path(self, file: int) -> Location:
        return self.folder / self._manifest["files"][file]["name"]

    def _bytes(self, file: int, offset: int, size: int) -> torch.Tensor:
        return self._source(file).read(offset, size)

    def _source(self, file: int) -> ByteSource:
        if file not in self._sources:
            path, total = self._path(file), self._manifest["files"][file]["bytes"]
            if isinstance(path, Path):  # a mapping of a file that was cut short since would end the process
                name = path.name
                manifests.check_size(path, total, file_sizes(self.folder, [name]).get(name))
            self._sources[file] = ByteSource(path, total)
        return self._sources[file]


def open_checkpoint(
    root: str | Location,
    step: int | None = None,
    *,
    kinds: Collection[str] | None = None,
    part: int = 0,
    parts: int = 1,
    share: Share = lambda text: [text],
    report: Callable[[str], None] = lambda note: print(note, file=sys.stderr),
) -> Reader:
    """The newest checkpoint under `root` whose checksums hold, or exactly the one of `step`.

    A damaged one is passed over for the one before it, and `report` says so; a damaged one of `step` is an error.
    kinds: verify only what will be read (generation needs "weight"). part, parts, share: processes that open the same
    folder together share the verification and come to the same choice; `share` as in `save`. All of them report alike.
    Raises: CheckpointError if nothing can be loaded, with the reason for each.
    """
    found = _seen_by_all(root, step, share)
    reasons = list(found[0].notes)
    for note in reasons:
        report(f"warning: {note}")
    for number, candidate in enumerate(found):
        problem = ""
        try:
            reader = Reader(candidate)
            reader.verify(kinds, part, parts)
        except CheckpointError as error:
            problem = str(error)
        problems = list(dict.fromkeys(filter(None, share(problem))))
        if not problems:
            if reasons:
                report(f"warning: loading {candidate.folder} instead")
            return reader
        reasons += problems
        if number + 1 < len(found):
            for problem in problems:
                report(f"warning: {problem}")
    if step is not None:
        raise CheckpointError("; ".join(reasons) + ". Leave iteration out to load the newest one that is whole.")
    raise CheckpointError(f"{root} holds no undamaged checkpoint:\n  " + "\n  ".join(reasons))


def _seen_by_all(root: str | Location, step: int | None, share: Share) -> list[CheckpointPath]:
    found: list[CheckpointPath] = []
    problem = ""
    try:
        found = candidates(root, step)
    except CheckpointError as error:
        problem = str(error)
    seen = ", ".join(f"{one.folder.name} of {one.manifest['created']}" for one in found)
    written = [one.manifest["created_ns"] for one in found]
    told = [json.loads(text) for text in share(json.dumps([seen, written, problem]))]
    if all(one == told[0] for one in told):
        if problem:
            raise CheckpointError(problem)
        return found
    lines = [f"rank {rank}: {problem or seen}" for rank, (seen, _, problem) in enumerate(told)]
    raise CheckpointError(
        f"the ranks see different checkpoints in {root}; it must be on shared storage:\n  " + "\n  ".join(lines[:8])
    )
