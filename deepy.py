#!/usr/bin/env python3
"""Start a script on every process of a run: ./deepy.py train.py configs/quickstart.yml"""

from megatron.cli.deepy import main
from megatron.common.errors import run_main

if __name__ == "__main__":
    run_main(main)
