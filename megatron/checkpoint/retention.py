"""Which older checkpoints are removed, and not before those that stay have been read back.

Invariant: after pruning at least two checkpoints are left whose checksums were compared, if there were two.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass

from megatron.checkpoint.find import CheckpointPath, complete
from megatron.checkpoint.publish import Publication
from megatron.checkpoint.reader import Reader
from megatron.common.errors import CheckpointError

Share = Callable[[str], list[str]]


@dataclass(frozen=True)
class Retention:
    """Which older checkpoints stay.

    keep_last_n: how many of the most recently written stay (keep_last_n_checkpoints); None keeps all. Never fewer
    than two
        stay, so that a damaged newest one does not end a run.
    keep_steps: steps that stay for ever (extra_save_iters).
    keep_every: multiples of this step stay for ever (keep_checkpoint_every).
    """

    keep_last_n: int | None = None
    keep_steps: Collection[int] = ()
    keep_every: int | None = None

    def is_permanent(self, step: int) -> bool:
        """Whether pruning must leave the step alone."""
        return step in self.keep_steps or (bool(self.keep_every) and step % (self.keep_every or 1) == 0)


class Verified:
    """Checkpoints that this process knows to be whole or damaged, by folder and time of writing: read once only."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, int], str] = {}

    def problem(self, checkpoint: CheckpointPath) -> str | None:
        """What is wrong with it: nothing is "", not known is None."""
        return self.known.get(_key(checkpoint))

    def learn(self, checkpoint: CheckpointPath, problem: str) -> None:
        """Remember what reading it showed."""
        self.known[_key(checkpoint)] = problem


def prune(
    place: Publication, retention: Retention, verified: Verified, *, rank: int, world_size: int, share: Share
) -> list[str]:
    """Remove checkpoints beyond the retention; return warnings. All ranks read a part of what has to be verified.

    Parallel: collective. A failure is a warning: the new checkpoint is already published.
    """
    warnings: list[str] = []
    while True:
        folder, old = "", list[CheckpointPath]()
        if rank == 0:
            try:
                folder, old = _plan(place, retention, verified)
            except (OSError, CheckpointError) as error:
                warnings.append(f"old checkpoints in {place.root} were not looked at: {error}")
        folder = json.loads(share(json.dumps(folder))[0])
        if not folder:
            break
        reports = share(_verify(place, folder, rank, world_size))
        problem = "; ".join(dict.fromkeys(filter(None, reports)))
        if rank == 0:
            (checkpoint,) = [one for one in complete(place.root)[0] if one.folder.name == folder]
            verified.learn(checkpoint, problem)
            if problem:
                warnings.append(f"{problem}. It is left in place and does not count as kept; look at the storage")
    for checkpoint in old:
        try:
            place.remove(checkpoint.folder)
        except OSError as error:
            warnings.append(f"old checkpoints in {place.root} could not be removed: {error}")
            break
    return warnings


def _plan(place: Publication, retention: Retention, verified: Verified) -> tuple[str, list[CheckpointPath]]:
    """(a folder that must be verified before anything can be removed, or "" and what to remove)."""
    place.tidy()
    if retention.keep_last_n is None:
        return "", []
    found = complete(place.root)[0]
    found.sort(key=lambda checkpoint: checkpoint.folder != place.folder)
    wanted, kept = max(retention.keep_last_n, 2), 0
    if all(retention.is_permanent(checkpoint.step) for checkpoint in found[wanted:]):
        return "", []
    for number, checkpoint in enumerate(found):
        if kept == wanted:
            removable = [one for one in found[number:] if not retention.is_permanent(one.step)]
            return "", [one for one in removable if not verified.problem(one)]
        # Beyond the two that must be known to be whole, those that are kept need not be read.
        if kept < 2 and verified.problem(checkpoint) is None:
            return checkpoint.folder.name, []
        kept += not verified.problem(checkpoint)
    return "", []


def _verify(place: Publication, name: str, rank: int, world_size: int) -> str:
    try:
        Reader(place.root / name).verify(part=rank, parts=world_size)
    except CheckpointError as error:
        return str(error)
    return ""


def _key(checkpoint: CheckpointPath) -> tuple[str, int]:
    return str(checkpoint.folder), checkpoint.manifest["created_ns"]
