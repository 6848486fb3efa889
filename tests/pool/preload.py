"""What every rank of a distributed test needs and what is slow to import: done once, before any rank is forked.

Importing this module starts no thread and touches no CUDA device, so that the process may be forked afterwards.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import deepspeed.ops
import deepspeed.runtime.bf16_optimizer
import deepspeed.runtime.pipe.engine
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage_1_and_2
import hypothesis  # noqa: F401 - test modules import both
import numpy  # noqa: F401
import pytest  # noqa: F401
import torch
import torch.distributed

# Left alone, `init_distributed` compiles this C++ op on the first call: a silent minute, and shared memory left behind.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

torch.set_num_threads(1)
