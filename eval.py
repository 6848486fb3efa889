"""Upstream's name for evaluate.py."""

from megatron.common.interpreter import run_command

if __name__ == "__main__":
    run_command("megatron.cli.evaluate")
