"""Fetch a corpus and tokenise it: `python prepare_data.py [dataset] -d data`."""

from megatron.common.interpreter import run_command

if __name__ == "__main__":
    run_command("megatron.cli.prepare_data")
