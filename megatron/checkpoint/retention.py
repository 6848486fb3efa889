"""Which older checkpoints are removed, and not before those that stay have been read back.

Invariant: after pruning at least two checkpoints are left whose checksums were compared, if there were two.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from megatron.checkpoint.find import CheckpointPath, complete
from megatron.checkpoint.publish import Publication
from megatron.checkpoint.reader import Reader, Share
from megatron.common.errors import CheckpointError


@dataclass(frozen=True)
class Retention:
    """Which older checkpoints stay.

    keep_last_n: how many of the most recently written stay (keep_last_n_checkpoints); None keeps all. Never fewer
    than two stay, so that a damaged newest one does not end a run.
    keep_steps: steps that stay for ever (extra_save_iters).
    keep_every: multiples of this step stay for ever (keep_checkpoint_every).
    keep_before, num_before: of the steps below the first, so many of the highest stay for now: a run that has met bad
    steps may have to go back behind them.
    """

    keep_last_n: int | None = None
    keep_steps: Collection[int] = ()
    keep_every: int | None = None
    keep_before: int | None = None
    num_before: int = 1

    def stay(self, steps: Iterable[int]) -> set[int]:
        """Which of these steps pruning must leave alone, however old they are."""
        steps = sorted(steps, reverse=True)
        kept = {step for step in steps if step in self.keep_steps or (self.keep_every and step % self.keep_every == 0)}
        if self.keep_before is not None:
            kept |= set([step for step in steps if step < self.keep_before][: self.num_before])
        return kept


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
    stay = retention.stay(one.step for one in found if not verified.problem(one))
    if all(checkpoint.step in stay for checkpoint in found[wanted:]):
        return "", []
    for number, checkpoint in enumerate(found):
        if kept == wanted:
            removable = [one for one in found[number:] if one.step not in stay]
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
