"""Start a run again after a failure or a requeue, from its newest checkpoint, for as long as that leads somewhere.

Knows of checkpoints only that a published one is a folder `global_step<N>` with a manifest; whether it is sound is for
the ranks to find out, which fall back to an older one. Invariant: a run that was asked to stop, or that would fail
again in the same way, is not started again.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.common.errors import CheckpointError, ConfigError, DataError, LaunchError, NonFiniteLossError
from megatron.common.stop import STOP_SIGNALS
from megatron.config import Config

MANIFEST = "manifest.json"
_STEP_FOLDER = re.compile(r"global_step(\d+)")
# Whoever mends these is a person: resuming is exact, so the same error would come again.
LASTING = {error.exit_code for error in (ConfigError, LaunchError, DataError, NonFiniteLossError)}
ASKED = {128 + number for number in STOP_SIGNALS}
# Seconds before a restart, by how many failures there have been without a checkpoint of a later step.
DELAYS_S = (1.0, 10.0, 60.0)
# Starts of a requeued job without a new checkpoint between them, before it is given up.
MAX_FRUITLESS = 3


@dataclass(frozen=True)
class Published:
    """A checkpoint in the run's `save` folder. folder: a path or an address. written_s: when its manifest was."""

    folder: str
    step: int
    written_s: float


def newest_checkpoint(save: str | Path) -> Published | None:
    """The most recently published checkpoint in a folder or at an address of fsspec, None where there is none.

    Raises: CheckpointError if the address cannot be looked at.
    """
    save = str(save).removeprefix("file://")
    manifests = _remote_manifests(save) if "://" in save else _local_manifests(save)
    found = []
    for manifest, written_s in manifests.items():
        folder = manifest.rsplit("/", 1)[0]
        match = _STEP_FOLDER.fullmatch(folder.rsplit("/", 1)[-1])
        if match is not None:
            found.append(Published(folder, int(match[1]), written_s))
    return max(found, key=lambda checkpoint: checkpoint.written_s, default=None)


def _local_manifests(save: str) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in Path(save).glob(f"global_step*/{MANIFEST}")}


def _remote_manifests(save: str) -> dict[str, float]:
    scheme = save.split("://", 1)[0]
    try:
        fs, path = importlib.import_module("fsspec.core").url_to_fs(save, use_listings_cache=False)
        found = fs.glob(f"{path.rstrip('/')}/global_step*/{MANIFEST}")
        # Its own time: not every store tells when an object was written.
        return {f"{scheme}://{name.lstrip('/')}": json.loads(fs.cat_file(name))["created_ns"] / 1e9 for name in found}
    except Exception as error:  # libraries below have error families of their own
        raise CheckpointError(
            f"{save} cannot be looked at for checkpoints to go on from: {error}. docs/checkpoints.md tells what object "
            "storage needs; without --max-restarts and --submit nobody has to look."
        ) from error


def require_restartable(config: Config, script: str, *, is_inference: bool) -> None:
    """Raises: ConfigError where a restart would have nothing to go on from."""
    if is_inference:
        raise ConfigError(f"--max-restarts: {script} writes no checkpoints to go on from. Leave it out.")
    if config.checkpoint.save is None:
        raise ConfigError("--max-restarts goes on from checkpoints, and save is not set. Set save, or leave it out.")


def refuse_restarts(max_restarts: int, starter: str) -> None:
    """Raises: ConfigError if restarts are asked for where this program does not start the processes."""
    if max_restarts:
        raise ConfigError(
            f"--max-restarts: here {starter} starts the processes, so it is the one to start them again. Use what it "
            "offers (torchrun --max-restarts, sbatch --requeue), with load set to the same folder as save."
        )


def continued(config: Config) -> Config:
    """The configuration with which a run goes on from its own checkpoints, wherever it began."""
    return config.replace(
        load=config.checkpoint.save,
        iteration=None,
        finetune=False,
        no_load_optim=False,
        no_load_rng=config.checkpoint.no_save_rng,
    )


def requeued(config: Config, since_s: float) -> Config:
    """The configuration with which a job that Slurm started again goes on: as it began if it has not saved yet.

    since_s: when the job was submitted, in seconds since 1970. An older checkpoint in `save` is another run's.
    Raises: CheckpointError as `newest_checkpoint`.
    """
    newest = newest_checkpoint(config.checkpoint.save) if config.checkpoint.save is not None else None
    return continued(config) if newest is not None and newest.written_s > since_s else config


def require_progress(config: Config, record: Path) -> None:
    """Note in a file which checkpoint a requeued job goes on from, and refuse to do so in a circle.

    Raises: LaunchError, whose exit code the batch script does not requeue.
    """
    if config.checkpoint.save is None:
        return
    newest = newest_checkpoint(config.checkpoint.save)
    name = newest.folder if newest is not None else "the beginning"
    before = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    record.write_text("".join(f"{line}\n" for line in [*before, name]), encoding="utf-8")
    if before[-MAX_FRUITLESS:] == [name] * MAX_FRUITLESS:
        raise LaunchError(
            f"the job was started {MAX_FRUITLESS + 1} times in a row from the same place, {name}, so it would never "
            "get on. Give it more time than its start-up takes (--time), or a larger --warn-s if saving takes long."
        )


def run_with_restarts(
    attempt: Callable[[Config], int],
    config: Config,
    max_restarts: int,
    *,
    wait: Callable[[float], None] = time.sleep,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> int:
    """Make attempts until one succeeds, is asked to stop, cannot be helped, or the restarts are used up.

    attempt: starts the run with a configuration and returns its exit code. A checkpoint that was there before the
    first attempt is another run's until `load` says otherwise: only newer ones are gone on from.
    Returns: the exit code of the last attempt.
    """
    assert config.checkpoint.save is not None, "see require_restartable"
    before, best, fruitless = newest_checkpoint(config.checkpoint.save), -1, 0
    for number in range(1, max_restarts + 2):
        code = attempt(config)
        newest = newest_checkpoint(config.checkpoint.save)
        own = newest if newest != before else None
        has_progressed = own is not None and own.step > best
        best = max(best, own.step if own is not None else best)
        fruitless = 0 if has_progressed else fruitless + 1
        if code == 0 or code in ASKED:
            return code
        reason = _reason_to_end(code, number > max_restarts, has_progressed, fruitless, max_restarts)
        if reason:
            say(f"not restarted after exit code {code}: {reason}")
            return code
        if own is not None:
            config, source = continued(config), f"from {own.folder}"
        else:
            source = "as it began, for it has not saved yet"
        delay = DELAYS_S[min(fruitless, len(DELAYS_S) - 1)]
        say(f"restart {number} of {max_restarts} after exit code {code}: {source}, in {delay:g} s")
        wait(delay)
    raise AssertionError("unreachable: the last attempt returns")


def _reason_to_end(code: int, is_used_up: bool, has_progressed: bool, fruitless: int, max_restarts: int) -> str | None:
    if code in LASTING:
        return "it would come again"
    if code == CheckpointError.exit_code and not has_progressed:
        return "no checkpoint could be loaded or written, and that needs a person"
    if fruitless >= len(DELAYS_S):
        return f"{fruitless} failures in a row without getting further between them"
    if is_used_up:
        return f"--max-restarts {max_restarts} are used up"
    return None
