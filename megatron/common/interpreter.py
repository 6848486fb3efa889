"""The first thing an entry script does: find a Python that has the requirements, and only then load the command.

Needs nothing but an old Python's standard library, and no newer syntax. Invariant: whoever lacks the requirements gets
the project's own environment where there is one, else one line that says how to make it; never a traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from megatron.common.errors import LaunchError, run_main
from megatron.common.stop import StopSignals

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parents[2]
_SWITCHED = "MEGATRON_SWITCHED_PYTHON"
_RANKS = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def run_command(module: str) -> None:
    """Run `main` of a module of megatron.cli and exit with its code; see `megatron.common.errors.run_main`.

    A stop signal unwinds the command, whichever it is, so that it leaves nothing half-written.
    """

    def main() -> int | None:
        with StopSignals():
            return load_command(module)()

    run_main(main)


def load_command(module: str) -> Callable[[], int | None]:
    """The `main` of a module.

    Does not return if this Python lacks what the module imports and the environment of `make` has a Python: that one
    then takes this process's place. Raises: LaunchError if there is none, or it lacks something as well.
    """
    was_switched = os.environ.pop(_SWITCHED, None) is not None
    if sys.version_info < OLDEST:
        lack = "is version {}.{}, and {}.{} or newer is needed".format(*sys.version_info[:2], *OLDEST)
    else:
        try:
            return importlib.import_module(module).main
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] == "megatron":
                raise
            lack = f"lacks {error.name.split('.')[0]}"
    python = ROOT / ".venv" / "bin" / "python"
    if not was_switched and os.access(python, os.X_OK):
        if all(os.environ.get(name, "0") == "0" for name in _RANKS):
            print(f"note: {sys.executable} {lack}; using {python}", file=sys.stderr, flush=True)
        os.environ[_SWITCHED] = "1"
        os.execv(python, [str(python), *getattr(sys, "orig_argv", ["", *sys.argv])[1:]])
    raise LaunchError(
        f"this Python ({sys.executable}) {lack}. Run `make quickstart` once, which makes an environment in .venv, or "
        "`pip install -r requirements/requirements.txt`."
    )
