"""Labelled JSON Lines to token and label files; see megatron/cli/preprocess_labelled.py."""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from megatron.common.interpreter import run_command

if __name__ == "__main__":
    run_command("megatron.cli.preprocess_labelled")
