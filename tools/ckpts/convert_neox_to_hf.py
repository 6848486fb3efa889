"""Convert a checkpoint to a Hugging Face folder; see megatron/cli/convert_neox_to_hf.py."""

import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from megatron.cli.convert_neox_to_hf import main
from megatron.common.errors import run_main

if __name__ == "__main__":
    run_main(main)
