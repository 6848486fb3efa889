"""Saving: every rank writes its own pieces, rank 0 publishes them in one step.

    .global_stepN.tmp/   every rank writes rank_R.safetensors and its index, flushed to the disk
    agree                rank 0 merges the indices, checks that the tensors are covered exactly once, writes a manifest
    rename               .global_stepN.tmp -> global_stepN, then `latest`, then old checkpoints are removed
    agree                every rank knows whether it is done

Nothing is gathered, nothing is pickled. torch.distributed.checkpoint is not used: its files are pickled or its
metadata is, it writes in place, and it cannot read a flat fragment of a ZeRO partition into another tensor-parallel
split.
Invariant: at any moment of a save, the previous checkpoint can be loaded, and no half-written folder bears a
checkpoint's name.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import manifest as manifests
from megatron.checkpoint.find import LATEST, PUBLISHING, complete, step_folder
from megatron.checkpoint.piece import Piece, encode, index_entries
from megatron.checkpoint.storage import Storage
from megatron.common.errors import CheckpointError

Agree = Callable[[bool], bool]


@dataclass(frozen=True)
class Retention:
    """Which older checkpoints stay.

    keep_last_n: how many of the most recently written stay (keep_last_n_checkpoints); None keeps all. Never fewer
    than two
        stay, so that a damaged newest one does not end a run.
    keep_steps: steps that stay for ever (extra_save_iters).
    keep_every: multiples of this step stay for ever.
    """

    keep_last_n: int | None = None
    keep_steps: Collection[int] = ()
    keep_every: int | None = None

    def is_permanent(self, step: int) -> bool:
        """Whether pruning must leave the step alone."""
        return step in self.keep_steps or (bool(self.keep_every) and step % (self.keep_every or 1) == 0)


@dataclass(frozen=True)
class Saved:
    """What a save did. differing_replicas and warnings are known on rank 0 only.

    bytes_written: of this rank. differing_replicas: tensors of which two ranks hold different copies, which is a
    defect of the run (rank 0's copy was written).
    """

    folder: Path
    bytes_written: int
    differing_replicas: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def save(
    root: str | Path,
    step: int,
    pieces: Iterable[Piece],
    state: Mapping[str, Any],
    *,
    rank: int = 0,
    world_size: int = 1,
    agree: Agree = lambda ok: ok,
    source_files: Sequence[tuple[str, str]] = (),
    rank_tensors: Mapping[str, torch.Tensor] | None = None,
    used_rows: Mapping[str, int] | None = None,
    expected_names: Collection[str] | None = None,
    retention: Retention | None = None,
    storage: Storage | None = None,
) -> Saved:
    """Write the checkpoint `<root>/global_step<step>` together with all other ranks.

    pieces: what this rank holds. state: JSON values, the same on all ranks (rank 0's are written).
    agree: gives all ranks whether all are well, and lets none pass before all have come (an all-reduce with minimum).
    source_files: (name, text) kept verbatim under configs/. rank_tensors: this rank's own small tensors (random
    states). used_rows: per padded tensor, the rows that mean something (vocab_size); a reader may pad the rest
    differently. expected_names: if given, exactly these tensors must be there.
    Parallel: all ranks call it, on one shared file system.
    Raises: CheckpointError on every rank if any rank failed; the previous checkpoints are untouched.
    """
    root, disk = Path(root), storage or Storage()
    temporary = root / f".global_step{step}.tmp"
    errors = _Errors(temporary, rank, disk)
    result = Saved(step_folder(root, step), 0)

    with errors:
        if rank == 0:
            _clean(root, disk)
            disk.make_directory(temporary)
    errors.settle(agree, f"cannot begin to save step {step} in {root}")
    with errors:
        if not temporary.is_dir():
            raise CheckpointError(
                f"{root} made by rank 0 is not seen by rank {rank}: the folder must be on shared storage"
            )
        result = Saved(result.folder, _write_rank(temporary, rank, pieces, rank_tensors or {}, disk))
    errors.settle(agree, f"step {step} was not saved in {root}")
    with errors:
        if rank == 0:
            configs = _write_configs(temporary, source_files, disk)
            names = [temporary / f"rank_{number:05d}.index.json" for number in range(world_size)]
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
            disk.write_file(temporary / manifests.MANIFEST, [manifests.dumps(manifest)])
            disk.flush_directory(temporary)
            _publish(root, temporary, result.folder, disk)
            warnings = _prune(root, step, retention or Retention(), disk)
            result = Saved(result.folder, result.bytes_written, tuple(differing), tuple(warnings))
    errors.settle(agree, f"step {step} was not saved in {root}")
    return result


class _Errors:
    """Collects this rank's failure until all ranks may speak of it: never raise on one rank between collectives."""

    def __init__(self, temporary: Path, rank: int, disk: Storage) -> None:
        self.temporary, self.rank, self.disk = temporary, rank, disk
        self.error: Exception | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        with contextlib.suppress(OSError):
            (self.temporary / f"rank_{self.rank:05d}.error").write_text(str(error))
        return True

    def settle(self, agree: Agree, what: str) -> None:
        """Raise on every rank if any rank failed."""
        if agree(self.error is None):
            return
        told = {f"rank {self.rank}": str(self.error)} if self.error else {}
        with contextlib.suppress(OSError):
            for path in sorted(self.temporary.glob("rank_*.error")):
                told[f"rank {int(path.stem.removeprefix('rank_'))}"] = path.read_text()
        agree(True)  # all have read the others' words before rank 0 gives the space back
        if self.rank == 0:
            with contextlib.suppress(OSError):
                self.disk.remove_tree(self.temporary)
        reasons = "; ".join(f"{who}: {why}" for who, why in told.items()) or "another rank failed, see its message"
        raise CheckpointError(f"{what}: {reasons}. Earlier checkpoints are untouched.") from self.error


def _write_rank(
    folder: Path, rank: int, pieces: Iterable[Piece], rank_tensors: Mapping[str, torch.Tensor], disk: Storage
) -> int:
    held = [piece for piece in pieces if piece.start < piece.stop]
    for piece in held:
        piece.check()
    index: dict[str, Any] = index_entries(held, rank_tensors)
    written = [piece for piece in held if not piece.is_replica]
    tensors = [(piece.key, piece.tensor, entry) for piece, entry in zip(written, index["pieces"], strict=True)]
    for (name, tensor), entry in zip(rank_tensors.items(), index["rank_tensors"], strict=True):
        tensors.append((f"rank/{rank}/{name}", tensor, entry))
    chunks = iter(encode(tensors))
    header = bytes(next(chunks))
    name = manifests.rank_file(rank)
    size = disk.write_file(folder / name, (chunk for part in ([header], chunks) for chunk in part))
    index["file"] = {"name": name, "bytes": size, "header_bytes": len(header), "header_crc32": zlib.crc32(header)}
    disk.write_file(folder / f"rank_{rank:05d}.index.json", [json.dumps(index).encode()])
    return size


def _write_configs(folder: Path, source_files: Sequence[tuple[str, str]], disk: Storage) -> dict[str, int]:
    configs: dict[str, int] = {}
    if source_files:
        disk.make_directory(folder / manifests.CONFIGS)
        for name, text in source_files:
            if not name or Path(name).name != name or name in configs:
                raise CheckpointError(f"source file {name!r} must be a plain name, given once")
            configs[name] = zlib.crc32(text.encode())
            disk.write_file(folder / manifests.CONFIGS / name, [text.encode()])
        disk.flush_directory(folder / manifests.CONFIGS)
    return configs


def _publish(root: Path, temporary: Path, folder: Path, disk: Storage) -> None:
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        if replaced.exists():
            disk.remove_tree(replaced)
        disk.rename(folder, replaced)
    disk.replace_text(root / PUBLISHING, folder.name)
    disk.rename(temporary, folder)
    disk.flush_directory(root)
    disk.replace_text(root / LATEST, folder.name)
    disk.unlink(root / PUBLISHING)


def _clean(root: Path, disk: Storage) -> None:
    """Remove what stopped saves and prunings left: hidden temporary folders, and replaced checkpoints that arrived."""
    disk.make_directory(root)
    for path in root.glob(".global_step*.tmp"):
        disk.remove_tree(path)
    for path in root.glob("global_step*.replaced"):
        if (root / path.name.removesuffix(".replaced") / manifests.MANIFEST).is_file():
            disk.remove_tree(path)


def _prune(root: Path, step: int, retention: Retention, disk: Storage) -> list[str]:
    """Remove checkpoints beyond the retention. A failure is a warning: the new checkpoint is already published."""
    warnings: list[str] = []
    try:
        for path in root.glob("global_step*.replaced"):
            disk.remove_tree(path)
        if retention.keep_last_n is None:
            return warnings
        old = [checkpoint for checkpoint in complete(root)[0] if checkpoint.step != step]
        beyond = old[max(retention.keep_last_n, 2) - 1 :]
        for checkpoint in (candidate for candidate in beyond if not retention.is_permanent(candidate.step)):
            hidden = root / f".{checkpoint.folder.name}.pruned.tmp"
            disk.rename(checkpoint.folder, hidden)
            disk.remove_tree(hidden)
    except OSError as error:
        warnings.append(f"old checkpoints in {root} could not be removed: {error}")
    return warnings
