#!/usr/bin/env python3
"""Start a script on every process of a run: ./deepy.py train.py configs/quickstart.yml"""

from megatron.common.interpreter import run_command

if __name__ == "__main__":
    run_command("megatron.cli.deepy")
