"""When and how a run's checkpoints get written: at once or in the background, and what a failure means for the run.

What a checkpoint holds is said in megatron.training.saving, its format in megatron.checkpoint. Invariant: no save fails
without a word, and a run never ends well without the checkpoint it owes at its end.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

import torch.distributed as dist

from megatron.checkpoint import Saved, Verified, location, save
from megatron.checkpoint.background import BackgroundSaver, Outcome
from megatron.checkpoint.location import RemotePath
from megatron.checkpoint.object_storage import ObjectStorage
from megatron.checkpoint.snapshot import Snapshot
from megatron.checkpoint.storage import Storage, probe, size
from megatron.common.errors import CheckpointError
from megatron.engine.state import export_pieces
from megatron.engine.train_engine import TrainEngine
from megatron.training.saving import Position, SaveOptions, agree, contents, save_run, share

# A rank that waits for a slow disk of another is not stuck; one that is gone shows by its closed connection.
_PATIENCE = datetime.timedelta(hours=12)


class Saver:
    """The checkpoints of one run.

    Parallel: all ranks call every method at the same points. message: prints on the rank that speaks.
    """

    def __init__(self, engine: TrainEngine, options: SaveOptions, message: Callable[[str], None]) -> None:
        self.options = options
        self._engine, self._message = engine, message
        self._verified = Verified()
        self._failure: CheckpointError | None = None
        self._background: BackgroundSaver | None = None
        if options.is_async and options.folder is not None:
            # Collectives of its own: the background thread must not meet those of the training thread.
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self._snapshot = Snapshot()
            self._background = BackgroundSaver(lambda ok: agree(ok, engine.device))

    def check_folder(self) -> None:
        """Write, rename and remove a file where checkpoints will go. Collective.

        Raises: CheckpointError on all ranks if one of them cannot.
        """
        if self.options.folder is None:
            return
        problem, root = "", location(self.options.folder)
        try:
            disk = ObjectStorage() if isinstance(root, RemotePath) else Storage()
            probe(root, disk, f"rank{self._engine.groups.global_rank}")
        except CheckpointError as error:
            problem = str(error)
        problems = list(dict.fromkeys(filter(None, share(problem))))
        if problems:
            raise CheckpointError("\n".join(problems))

    def save(self, position: Position) -> None:
        """Save this moment, in the background if so configured. Nothing happens where the run has no save folder.

        Raises: CheckpointError if a save failed and the run is to stop for it.
        """
        if self.options.folder is None:
            return
        if self._background is not None:
            self._save_in_background(self._background, position)
            return
        started = time.perf_counter()
        try:
            saved = save_run(self._engine, position, self.options, self._verified)
        except CheckpointError as error:
            self._failed(error)
            return
        assert saved is not None
        self._saved(saved, f"in {time.perf_counter() - started:.1f} s")

    def poll(self) -> None:
        """Tell what the background has to say; call it after every step. Raises: as `save`."""
        if self._background is not None:
            outcome = self._background.poll()
            self._tell(self._background, outcome)

    def settle(self) -> None:
        """Wait for the save in flight: the run goes on with what is on the disk. Collective. Raises: as `save`."""
        if self._background is not None and self._background.is_busy:
            self._message(f"waiting for the save of step {self._background.step}")
            self._tell(self._background, self._background.wait())

    def finish(self) -> None:
        """Wait for the save in flight: the run is about to leave. Collective.

        Raises: CheckpointError if the newest save of the run did not come about, whatever on_save_failure says.
        """
        self.settle()
        if self._failure is not None:
            raise CheckpointError(f"{self._failure} This was the last save of the run.") from self._failure

    def abandon(self) -> None:
        """Leave a save in flight to itself; without its end it is none, and the checkpoints before it are untouched."""
        self._background = None

    def close(self) -> None:
        """Wait for the save in flight and only report how it went: for a run that ends by another error."""
        try:
            self.settle()
        except Exception as error:  # the error that ends the run is the one to raise
            self._message(f"error: {error}")

    def _save_in_background(self, background: BackgroundSaver, position: Position) -> None:
        started = time.perf_counter()
        if background.is_busy:
            self._message(
                f"step {position.step} is to be saved while step {background.step} is still being written: training "
                "waits. Save less often, or to faster storage."
            )
            outcome = background.wait()
            self._message(f"waited {time.perf_counter() - started:.1f} s")
            self._tell(background, outcome)
            started = time.perf_counter()
        folder, arguments = self.options.folder, contents(self._engine, position, self.options)
        pieces = self._snapshot.take(export_pieces(self._engine))
        assert folder is not None

        def work() -> Saved:
            return save(
                folder,
                arguments["state"]["position"]["step"],
                pieces,
                share=lambda text: share(text, self._group),
                verified=self._verified,
                **arguments,
            )

        background.start(position.step, work)
        self._message(
            f"step {position.step} is being saved in the background; copying it took "
            f"{time.perf_counter() - started:.2f} s of training"
        )

    def _tell(self, background: BackgroundSaver, outcome: Outcome | None) -> None:
        for note in background.notes():
            self._message(f"warning: {note}")
        if outcome is None:
            return
        if outcome.saved is not None:
            self._saved(outcome.saved, f"in {outcome.seconds:.1f} s in the background")
        elif isinstance(outcome.error, CheckpointError):
            self._failed(outcome.error)
        else:
            raise CheckpointError(
                f"step {outcome.step} was not saved in {self.options.folder}: "
                f"{type(outcome.error).__name__}: {outcome.error}"
            ) from outcome.error

    def _saved(self, saved: Saved, how: str) -> None:
        self._failure = None
        self._message(f"saved {saved.folder} ({size(saved.bytes_written)} per rank) {how}")
        for warning in saved.warnings:
            self._message(f"warning: {warning}")
        if saved.differing_replicas:
            names = ", ".join(saved.differing_replicas[:5])
            self._message(f"warning: copies of {names} differ between ranks; rank 0's were saved")

    def _failed(self, error: CheckpointError) -> None:
        if self.options.on_failure == "stop":
            raise CheckpointError(
                f"{error} The run stops here; with on_save_failure: continue it would go on unsaved."
            ) from error
        self._failure = error
        self._message(f"warning: {error} Training goes on (on_save_failure: continue); the next save is as planned.")
