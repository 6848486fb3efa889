"""How a finished checkpoint appears under its name: by one rename on a file system, by its manifest on object storage.

It writes no tensors and reads none. Invariant: before `publish` the new checkpoint is no candidate for loading, after
it the new one is whole, and at no moment in between is the one before it less than whole.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

from megatron.checkpoint import manifest as manifests
from megatron.checkpoint.find import LATEST, PUBLISHING, step_folder
from megatron.checkpoint.location import Location, RemotePath
from megatron.checkpoint.storage import Storage
from megatron.common.errors import CheckpointError


class RenamePublication:
    """A hidden temporary folder that gets its name when it is complete."""

    def __init__(self, root: Path, step: int, disk: Storage) -> None:
        self.root, self.disk = root, disk
        self.folder = step_folder(root, step)
        self.work = root / f".global_step{step}.tmp"
        self.suffix = ""

    def begin(self) -> str:
        """Make room (rank 0); the answer goes to `join` of all ranks."""
        self.disk.make_directory(self.root)
        for path in self.root.glob(".global_step*.tmp"):
            self.disk.remove_tree(path)
        for path in self.root.glob("global_step*.replaced"):
            if (self.root / path.name.removesuffix(".replaced") / manifests.MANIFEST).is_file():
                self.disk.remove_tree(path)
        self.disk.make_directory(self.work)
        return ""

    def join(self, begun: str, rank: int) -> None:
        """Raises: CheckpointError if this rank does not see what rank 0 made."""
        if not self.work.is_dir():
            raise CheckpointError(
                f"{self.root} made by rank 0 is not seen by rank {rank}: the folder must be on shared storage"
            )

    def publish(self, manifest: dict[str, Any]) -> None:
        """The manifest, the name, and `latest`, in this order."""
        disk = self.disk
        disk.write_file(self.work / manifests.MANIFEST, [manifests.dumps(manifest)])
        disk.flush_directory(self.work)
        replaced = self.folder.with_name(self.folder.name + ".replaced")
        if self.folder.exists():
            if replaced.exists():
                disk.remove_tree(replaced)
            disk.rename(self.folder, replaced)
        # The marker serves a process that is killed here. After a power cut without it, the previous one is loaded.
        disk.replace_text(self.root / PUBLISHING, self.folder.name, is_lasting=False)
        disk.rename(self.work, self.folder)
        disk.replace_text(self.root / LATEST, self.folder.name)  # flushes the folder's new name as well
        disk.unlink(self.root / PUBLISHING)

    def abandon(self) -> None:
        """Give the space back."""
        with contextlib.suppress(OSError):
            self.disk.remove_tree(self.work)

    def tidy(self) -> None:
        """Remove what the new checkpoint has replaced."""
        for path in self.root.glob("global_step*.replaced"):
            self.disk.remove_tree(path)

    def remove(self, folder: Any) -> None:
        """Remove another checkpoint; it loses its name first."""
        hidden = self.root / f".{folder.name}.pruned.tmp"
        self.disk.rename(folder, hidden)
        self.disk.remove_tree(hidden)


_OURS = re.compile(r"(rank_\d{5}(-\d+)?\.(safetensors|index\.json)|configs(-\d+)?/[^/]+)")


class ObjectPublication:
    """Objects under their final address, which mean nothing until a manifest names them.

    There is no rename. Every attempt at a step gives its files names of their own (a suffix), so that the manifest of
    a checkpoint that is being replaced stays true until the new one takes its place in one request.
    """

    def __init__(self, root: RemotePath, step: int, disk: Storage) -> None:
        self.root, self.disk = root, disk
        self.folder = step_folder(root, step)
        self.work = self.folder
        self.suffix = ""
        self._manifest = self.folder / manifests.MANIFEST

    def begin(self) -> str:
        """Remove what stopped saves left (rank 0), and choose the suffix of this attempt."""
        for path in list(self.root.iterdir()) if self.root.exists() else []:
            if path.name.startswith("global_step") and not (path / manifests.MANIFEST).is_file():
                self._remove_ours(path, keep=())
        there = self.folder.tree() if self.folder.exists() else {}
        numbers = [int(match.group(1)) for name in there if (match := re.search(r"-(\d+)[./]", name))]
        return f"-{max(numbers, default=0) + 1}" if there else ""

    def join(self, begun: str, rank: int) -> None:
        """Take the suffix that rank 0 chose."""
        self.suffix = begun

    def publish(self, manifest: dict[str, Any]) -> None:
        """The manifest, which makes it a checkpoint, then `latest`."""
        disk = self.disk
        if self.suffix:
            manifest["suffix"] = self.suffix
        disk.replace_text(self.root / PUBLISHING, self.folder.name + self.suffix)
        disk.write_file(self._manifest, [manifests.dumps(manifest)])
        disk.replace_text(self.root / LATEST, self.folder.name)
        disk.unlink(self.root / PUBLISHING)

    def abandon(self) -> None:
        """Remove this attempt's files; those of a checkpoint that it was to replace stay."""
        with contextlib.suppress(OSError):
            if self._manifest.is_file():
                self._keep_what_the_manifest_names()
            elif self.folder.exists():
                self._remove_ours(self.folder, keep=())

    def tidy(self) -> None:
        """Remove what the new checkpoint has replaced, and what stopped attempts at it left."""
        self._keep_what_the_manifest_names()

    def remove(self, folder: Any) -> None:
        """Remove another checkpoint; it loses its manifest first."""
        self.disk.unlink(folder / manifests.MANIFEST)
        self.disk.remove_tree(folder)

    def _keep_what_the_manifest_names(self) -> None:
        try:
            manifest = manifests.load(self.folder)
        except CheckpointError:
            return
        configs = manifests.configs_folder(manifest)
        named = {file["name"] for file in manifest["files"]} | {f"{configs}/{name}" for name in manifest["configs"]}
        self._remove_ours(self.folder, keep=named)

    def _remove_ours(self, folder: RemotePath, keep: Any) -> None:
        for name in folder.tree():
            if name not in keep and _OURS.fullmatch(name):
                self.disk.unlink(folder / name)


Publication = RenamePublication | ObjectPublication


def publication(root: Location, step: int, disk: Storage) -> Publication:
    """The way that suits the storage."""
    if isinstance(root, RemotePath):
        return ObjectPublication(root, step, disk)
    return RenamePublication(root, step, disk)
