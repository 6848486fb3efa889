"""Saving: every rank writes its own pieces, rank 0 publishes them in one step.

    room       all ranks add up their bytes; rank 0 compares with what is free
    write      every rank writes rank_R.safetensors, flushed to the disk, and its index
    publish    rank 0 merges the indices, checks that the tensors are covered exactly once, writes the manifest, and
               makes the folder appear (megatron.checkpoint.publish), then `latest`
    prune      old checkpoints are removed (megatron.checkpoint.retention)

After each, all ranks learn how it went. Nothing is gathered, nothing is pickled. docs/checkpoints.md says why, and why
not with torch.distributed.checkpoint.
Invariant: at any moment of a save, the previous checkpoint can be loaded, and no half-written folder bears a
checkpoint's name.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import manifest as manifests
from megatron.checkpoint.location import Location, RemotePath, location
from megatron.checkpoint.object_storage import ObjectStorage
from megatron.checkpoint.piece import Piece, encode, index_entries
from megatron.checkpoint.publish import Publication, publication
from megatron.checkpoint.reader import Share
from megatron.checkpoint.retention import Retention, Verified, prune
from megatron.checkpoint.storage import Storage, explain, size
from megatron.common.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    """What a save did. differing_replicas and warnings are known on rank 0 only.

    bytes_written: of this rank. differing_replicas: tensors of which two ranks hold different copies, which is a
    defect of the run (rank 0's copy was written).
    """

    folder: Location
    bytes_written: int
    differing_replicas: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def save(
    root: str | Location,
    step: int,
    pieces: Iterable[Piece],
    state: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    share: Share = lambda text: [text],
    source_files: Sequence[tuple[str, str]] = (),
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    used_rows: Mapping[str, int] | None = None,
    expected_names: Collection[str] | None = None,
    retention: Retention | None = None,
    verified: Verified | None = None,
    storage: Storage | None = None,
) -> Saved:
    """Write the checkpoint `<root>/global_step<step>` together with all other ranks.

    pieces: what this rank holds. state: JSON values, the same on all ranks (rank 0's are written).
    share: gives all ranks the texts of all, by rank, and lets none pass before all have come (all_gather_object).
    source_files: (name, text) kept verbatim under configs/. rank_tensors: this rank's own small tensors (random
    states). used_rows: per padded tensor, the rows that mean something (vocab_size); a reader may pad the rest
    differently. expected_names: if given, exactly these tensors must be there. verified: what earlier saves of this
    process have read back; the caller keeps it.
    Parallel: all ranks call it, on one shared file system or object store.
    Raises: CheckpointError on every rank if any rank failed; the previous checkpoints are untouched.
    """
    root = location(root)
    disk = storage or (ObjectStorage() if isinstance(root, RemotePath) else Storage())
    place = publication(root, step, disk)
    ranks = _Ranks(place, rank, share, f"step {step} was not saved in {root}")
    held = [piece for piece in pieces if piece.start < piece.stop]
    result = Saved(place.folder, 0)

    with ranks:
        begun = place.begin() if rank == 0 else ""
    begun = ranks.settle(begun if rank == 0 and ranks.error is None else "")[0]
    with ranks:
        place.join(begun, rank)
    ranks.needed_bytes = sum(map(int, ranks.settle(str(_num_bytes(held, rank_tensors or {})))))
    with ranks:
        if rank == 0:
            _check_room(root, ranks.needed_bytes, disk)
    ranks.settle()
    with ranks:
        result = Saved(place.folder, _write_rank(place, rank, held, rank_tensors or {}, disk))
    ranks.settle()
    with ranks:
        if rank == 0:
            configs = _write_configs(place.work / (manifests.CONFIGS + place.suffix), source_files, disk)
            names = [place.work / f"rank_{number:05d}{place.suffix}.index.json" for number in range(world_size)]
            manifest, differing = manifests.merge(
                [json.loads(path.read_text()) for path in names],
                step=step,
                state=state,
                configs=configs,
                used_rows=used_rows or {},
                expected_names=expected_names,
            )
            for path in names:
                disk.unlink(path)
            place.publish(manifest)
            result = dataclasses.replace(result, differing_replicas=tuple(differing))
    ranks.settle()
    warnings = prune(
        place, retention or Retention(), verified or Verified(), rank=rank, world_size=world_size, share=share
    )
    return dataclasses.replace(result, warnings=tuple(warnings))


class _Ranks:
    """Collects this rank's failure until all ranks may speak of it: never raise on one rank between collectives."""

    def __init__(self, place: Publication, rank: int, share: Share, what: str) -> None:
        self.place, self.rank, self.share, self.what = place, rank, share, what
        self.error: Exception | None = None
        self.needed_bytes: int | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        return True

    def settle(self, text: str = "") -> list[str]:
        """The texts of all ranks. Raises: CheckpointError on every rank if any rank failed, with all ranks' reasons."""
        told = self.share(f"!{self._reason()}" if self.error else f" {text}")
        reasons = [f"rank {rank}: {words[1:]}" for rank, words in enumerate(told) if words.startswith("!")]
        if not reasons:
            return [words[1:] for words in told]
        if self.rank == 0:
            self.place.abandon()
        if len(told) == 1:
            reasons = [told[0][1:]]
        raise CheckpointError(
            f"{self.what}: {'; '.join(reasons).rstrip('.')}. Earlier checkpoints are untouched."
        ) from self.error

    def _reason(self) -> str:
        if isinstance(self.error, OSError):
            return explain(self.error, self.place.disk, self.place.root, self.needed_bytes)
        return (
            str(self.error) if isinstance(self.error, CheckpointError) else f"{type(self.error).__name__}: {self.error}"
        )


def _num_bytes(pieces: Sequence[Piece], rank_tensors: Mapping[str, torch.Tensor]) -> int:
    tensors = [piece.tensor for piece in pieces if not piece.is_replica] + list(rank_tensors.values())
    # A header and an index entry per tensor, and the smallest unit of the file system for each of three files.
    return sum(tensor.numel() * tensor.element_size() + 400 for tensor in tensors) + 3 * 4096


def _check_room(root: Location, needed_bytes: int, disk: Storage) -> None:
    free = disk.free_bytes(root)
    if free is not None and free < needed_bytes:
        raise CheckpointError(
            f"the checkpoint needs {size(needed_bytes)} and {size(free)} are free in {root}; nothing was written. "
            "Free some space, set a smaller keep_last_n_checkpoints, or save to another place"
        )


def _write_rank(
    place: Publication, rank: int, held: Sequence[Piece], rank_tensors: Mapping[str, torch.Tensor], disk: Storage
) -> int:
    for piece in held:
        piece.check()
    index: dict[str, Any] = index_entries(held, rank_tensors)
    written = [piece for piece in held if not piece.is_replica]
    tensors = [(piece.key, piece.tensor, entry) for piece, entry in zip(written, index["pieces"], strict=True)]
    for (name, tensor), entry in zip(rank_tensors.items(), index["rank_tensors"], strict=True):
        tensors.append((f"rank/{rank}/{name}", tensor, entry))
    chunks = iter(encode(tensors, {piece.key: piece.load for piece in written if piece.load is not None}))
    header = bytes(next(chunks))
    name = manifests.rank_file(rank, place.suffix)
    size = disk.write_file(place.work / name, (chunk for part in ([header], chunks) for chunk in part))
    index["file"] = {"name": name, "bytes": size, "header_bytes": len(header), "header_crc32": zlib.crc32(header)}
    # Rank 0 reads it in a moment, and then it is gone.
    path = place.work / f"rank_{rank:05d}{place.suffix}.index.json"
    disk.write_file(path, [json.dumps(index).encode()], is_lasting=False)
    return size


def _write_configs(folder: Location, source_files: Sequence[tuple[str, str]], disk: Storage) -> dict[str, int]:
    configs: dict[str, int] = {}
    if source_files:
        disk.make_directory(folder)
        for name, text in source_files:
            if not name or Path(name).name != name or name in configs:
                raise CheckpointError(f"source file {name!r} must be a plain name, given once")
            configs[name] = zlib.crc32(text.encode())
            disk.write_file(folder / name, [text.encode()])
        disk.flush_directory(folder)
    return configs
