#!/usr/bin/env python
"""Train a model: ./deepy.py train.py CONF.yml; under torchrun, srun or mpirun: train.py CONF.yml."""

from megatron.cli.train import main
from megatron.common.errors import run_main

if __name__ == "__main__":
    run_main(main)
