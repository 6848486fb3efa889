"""Command of the same name; see megatron/cli/verify_resume.py."""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron.common.interpreter import run_command

if __name__ == "__main__":
    run_command("megatron.cli.verify_resume")
