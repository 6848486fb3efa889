#!/usr/bin/env python
"""Train a model: ./deepy.py train.py configs/quickstart.yml, or under torchrun, srun or mpirun: train.py configs/quickstart.yml."""

from megatron.common.errors import run_main
from megatron.cli.train import main

if __name__ == "__main__":
    run_main(main)
