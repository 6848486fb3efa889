#!/usr/bin/env python
"""Train a model: ./deepy.py train.py CONF.yml; under torchrun, srun or mpirun: train.py CONF.yml."""

from megatron.common.interpreter import run_command

if __name__ == "__main__":
    run_command("megatron.cli.train")
