"""Upstream's name for evaluate.py."""

from megatron.cli.evaluate import main
from megatron.common.errors import run_main

if __name__ == "__main__":
    run_main(main)
