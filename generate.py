"""Generate text from a trained model; see megatron/cli/generate.py."""

from megatron.cli.generate import main
from megatron.common.errors import run_main

if __name__ == "__main__":
    run_main(main)
