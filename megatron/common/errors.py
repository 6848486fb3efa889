"""What a user sees when something cannot go on: one clear message and a documented exit code.

A `MegatronError` is shown without a traceback (`--debug` shows it); anything else is a defect of ours and keeps its
traceback. This module holds the classes and the wrapper that turns them into exit codes; messages live where they
arise. Invariant: every exit code below is unique and listed in README.md.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from megatron.common import heartbeat


class MegatronError(Exception):
    """A problem that the user can mend. The message says where, what was given, what is required, what to do."""

    exit_code = 1


class ConfigError(MegatronError):
    """A YAML file, an override or the combination of keys is wrong."""

    exit_code = 2


class LaunchError(MegatronError):
    """Processes could not be started, or one of them failed."""

    exit_code = 3


class DataError(MegatronError):
    """A dataset, index, tokenizer or prompt file is missing, damaged or of the wrong kind."""

    exit_code = 4


class CheckpointError(MegatronError):
    """A checkpoint is missing, damaged, or does not fit the model or the run."""

    exit_code = 5


class NonFiniteLossError(MegatronError):
    """The loss or the gradients became NaN or infinite beyond what the run's policy allows."""

    exit_code = 6


class WatchdogError(MegatronError):
    """A rank made no progress for longer than allowed."""

    exit_code = 7


class ReplicaError(MegatronError):
    """Ranks hold different copies of what must be one tensor (check_replicas)."""

    exit_code = 8


class Stopped(BaseException):
    """A signal asked this process to stop (see `megatron.common.stop`); number: which one.

    Like KeyboardInterrupt it is no error, and `except Exception` lets it pass.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.exit_code = 128 + number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit with its code; a `MegatronError` and a `Stopped` become one message on stderr.

    `MEGATRON_DEBUG=1` or `--debug` on the command line shows the traceback as well. In a process of a multi-process
    run, the rank and the host stand in front of every line of an error, ours or not: `megatron.launch.error_reports`
    then shows once what all ranks say.
    """
    try:
        code = main() or 0
    except MegatronError as error:
        _leave_to_watchdog()
        is_debugging = "--debug" in sys.argv or os.environ.get("MEGATRON_DEBUG") == "1"
        _report((traceback.format_exc() if is_debugging else "") + f"error: {error}")
        code = error.exit_code
    except Stopped as stop:
        _report(str(stop))
        code = stop.exit_code
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`): end quietly, and keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except Exception:
        _leave_to_watchdog()
        _report(traceback.format_exc().rstrip("\n"))
        code = 1
    sys.exit(code)


def _leave_to_watchdog() -> None:
    if heartbeat.ending.is_set():
        # It ends the process within seconds, and has said why.
        time.sleep(60.0)


def _report(text: str) -> None:
    rank = os.environ.get("RANK")
    if rank and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        front = f"[rank {rank} on {os.uname().nodename}] "
        text = "\n".join(front + line for line in text.split("\n"))
    print(text, file=sys.stderr, flush=True)
