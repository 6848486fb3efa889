"""Whatever `load` points to, opened for reading: a native checkpoint, or an upstream GPT-NeoX one.

Invariant: all ranks open the same folder or raise together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from pathlib import Path

from megatron.checkpoint import Location, find, location, open_checkpoint
from megatron.checkpoint.find import step_folders
from megatron.checkpoint.manifest import MANIFEST
from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader
from megatron.convert.neox_files import find_neox_folder, open_neox
from megatron.convert.neox_layers import GroupedLayout
from megatron.model.spec import ModelSpec


def foreign_folder(root: str | Location, step: int | None = None) -> Path | None:
    """The folder of weights of another program that `root` means; None where it is native, or nothing at all."""
    path = location(root)
    if not isinstance(path, Path) or not path.is_dir():
        return None
    if (path / MANIFEST).is_file() or any((folder / MANIFEST).is_file() for folder in step_folders(path).values()):
        return None
    return find_neox_folder(path, step)


def require_weights(root: str | Location, step: int | None = None) -> None:
    """Raises: CheckpointError if `open_weights` would find nothing there."""
    if foreign_folder(root, step) is None:
        find(root, step)


def open_weights(
    root: str | Location,
    spec: ModelSpec | None,
    step: int | None = None,
    *,
    kinds: Collection[str] | None = None,
    grouped: GroupedLayout | None = None,
    part: int = 0,
    parts: int = 1,
    agree: Callable[[bool], bool] = lambda ok: ok,
    report: Callable[[str], None] = lambda note: print(note, file=sys.stderr),
) -> AnyReader:
    """As `megatron.checkpoint.open_checkpoint`, for foreign folders too.

    spec: the architecture that the configuration states; a foreign folder does not state it itself. grouped: as in
    `open_neox`.
    Raises: CheckpointError on every rank, as above, or if a foreign folder has no `spec` or does not fit it.
    """
    folder = foreign_folder(root, step)
    if not agree(folder is None) and folder is None:
        raise CheckpointError(f"other ranks see another folder in {root}: use shared storage")
    if folder is None:
        return open_checkpoint(root, step, kinds=kinds, part=part, parts=parts, agree=agree, report=report)
    reader, problem = None, None
    try:
        if spec is None:
            raise CheckpointError(f"{folder} is a GPT-NeoX checkpoint, which does not say its model: give its YAML too")
        reader = open_neox(folder, spec, grouped)
        reader.verify(kinds, part, parts)
    except CheckpointError as error:
        problem = error
    if not agree(problem is None) or reader is None:
        raise problem or CheckpointError(f"{folder} cannot be read, see another rank's message")
    report(f"{folder} is a GPT-NeoX checkpoint: its weights are read as the configured model{reader.note}")
    return reader
