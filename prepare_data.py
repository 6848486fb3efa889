"""Fetch a corpus and tokenise it: `python prepare_data.py [dataset] -d data`."""

from megatron.cli.prepare_data import main
from megatron.common.errors import run_main

if __name__ == "__main__":
    run_main(main)
