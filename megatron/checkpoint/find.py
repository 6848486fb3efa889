"""Which checkpoint folder to load.

It reads names and manifests, no tensors, and changes nothing on the disk. Invariant: a folder without a whole
manifest, or with a file missing or cut short, is never returned.

The newest is the one that `latest` names, as people and tools may set it; but a save that was stopped after it had
published its folder and before it had moved `latest` left the file `.publishing` behind, and then that folder is the
newest. Where neither names a complete one, the most recently written complete one is taken.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron.checkpoint import manifest as manifests
from megatron.checkpoint.location import Location, RemotePath, location
from megatron.common.errors import CheckpointError

LATEST = "latest"
PUBLISHING = ".publishing"
PlaceT = TypeVar("PlaceT", Path, RemotePath)
_STEP_FOLDER = re.compile(r"global_step(\d+)(\.replaced)?")
_POINTER = re.compile(r"global_step(\d+)(-\d+)?")


@dataclass(frozen=True)
class CheckpointPath:
    """A complete checkpoint. notes: one sentence for each better candidate that was passed over, and why."""

    folder: Location
    step: int
    manifest: dict[str, Any]
    notes: tuple[str, ...] = ()


def step_folder(root: PlaceT, step: int) -> PlaceT:
    """Where the checkpoint of a step lies."""
    return root / f"global_step{step}"


def step_folders(root: Location) -> dict[int, Location]:
    """Every folder of `root` that bears a checkpoint's name, complete or not.

    A save that replaces a checkpoint of the same step moves the old one to `.replaced` for a moment; it stands in if
    the new one has not arrived.
    """
    found: dict[int, Location] = {}
    if root.is_dir():
        there: list[Location] = [*root.iterdir()]
        for path in sorted(there, key=lambda path: path.name, reverse=True):
            match = _STEP_FOLDER.fullmatch(path.name)
            if match and path.is_dir():
                found[int(match.group(1))] = path
    return found


def complete(root: Location) -> tuple[list[CheckpointPath], list[str]]:
    """(complete checkpoints, most recently written first; a sentence for each folder that is not complete)."""
    found, notes = [], []
    for step, folder in step_folders(root).items():
        try:
            found.append(CheckpointPath(folder, step, manifests.load(folder)))
        except CheckpointError as error:
            notes.append(str(error))
    found.sort(key=lambda checkpoint: -checkpoint.manifest["created_ns"])
    return found, notes


def candidates(root: str | Location, step: int | None = None) -> list[CheckpointPath]:
    """The complete checkpoints to try, best first, at least one. Arguments and Raises as `find`."""
    root = location(root)
    if (root / manifests.MANIFEST).is_file():
        manifest = manifests.load(root)
        return [CheckpointPath(root, manifest["step"], manifest)]
    if step is not None:
        folder = step_folders(root).get(step)
        if folder is None:
            there = ", ".join(map(str, sorted(step_folders(root)))) or "none"
            raise CheckpointError(f"{root} holds no checkpoint of step {step}; those there: {there}. Choose one.")
        return [CheckpointPath(folder, step, manifests.load(folder))]
    found, notes = complete(root)
    if not found:
        if notes:
            raise CheckpointError(
                f"{root} holds no complete checkpoint:\n  " + "\n  ".join(notes) + "\nPoint to another folder."
            )
        what = "does not exist" if not root.exists() else "holds no checkpoint (no global_step* folder)"
        raise CheckpointError(f"{root} {what}. Train and save one there first, or point to the folder that holds one.")
    (latest, problem), (publishing, _) = _pointed(root, LATEST), _pointed(root, PUBLISHING)
    youngest = found[0]
    found.sort(key=lambda checkpoint: latest is None or f"global_step{checkpoint.step}" != latest)
    # Not a `.replaced` folder of that step: the new one it made way for never arrived. Nor, on object storage, the
    # manifest of another attempt at it.
    found.sort(key=lambda checkpoint: checkpoint.folder.name + checkpoint.manifest.get("suffix", "") != publishing)
    if latest is not None and latest not in [f"global_step{checkpoint.step}" for checkpoint in found]:
        notes.append(f"{root / LATEST} names step {latest.removeprefix('global_step')}, which is not complete")
    first = found[0]
    if problem:
        notes.append(problem)
    elif latest == f"global_step{first.step}" and first is not youngest:
        notes.append(f"{youngest.folder} was written later than what {root / LATEST} names")
    return [CheckpointPath(first.folder, first.step, first.manifest, tuple(notes)), *found[1:]]


def find(root: str | Location, step: int | None = None) -> CheckpointPath:
    """The newest complete checkpoint under `root`, or the one of `step`; `root` may also be a checkpoint folder itself.

    Raises: CheckpointError if there is none, saying what is there instead.
    """
    return candidates(root, step)[0]


def _pointed(root: Location, pointer: str) -> tuple[str | None, str]:
    """(what the file names, None without it or where it names nothing; in words why it names nothing)."""
    path = root / pointer
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, ""
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror}"
    match = _POINTER.fullmatch(data.decode(errors="replace").strip())
    if match is None:
        return None, f"{path} is damaged: it names no checkpoint ({data[:40]!r})"
    return match.group(), ""
