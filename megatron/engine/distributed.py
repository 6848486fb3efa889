"""Start torch.distributed and DeepSpeed's communication on this rank, without compiling anything.

On a CPU DeepSpeed would build a shared-memory C++ extension inside init_distributed (a minute, a lock that a killed
build leaves behind, and segments in /dev/shm): it is vetoed here. Invariant: after `start_distributed` the five
rendezvous variables are set.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import os
import socket
import time
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import deepspeed.ops
from deepspeed.runtime.pipe.topology import PipelineParallelGrid

from megatron.common.errors import LaunchError
from megatron.ops.allocator import keep_freed_memory

_QUIET = logging.WARNING
# How often a rank asks whether it is its turn; of many ranks each asks less often, to spare the one that answers.
_TURN_POLL_S, _TURN_POLL_S_PER_RANK, _LONGEST_TURN_POLL_S = 0.02, 0.001, 1.0

# torch 2.13 renames collectives; DeepSpeed and torch 2.11 know the old names only.
warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)


def local_device(kind: str = "auto") -> torch.device:
    """This rank's device: its GPU by LOCAL_RANK, or the CPU.

    kind: auto (a GPU where there is one), cpu or cuda. Raises: LaunchError for cuda where there is none.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        raise LaunchError("device: cuda was asked for, and PyTorch sees no GPU. Use device: auto, or mend the driver.")
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def start_distributed(kind: str = "auto", timeout_s: float = 1800.0) -> torch.device:
    """Join the job that the environment describes (one process alone if it describes none); returns this rank's device.

    kind: see `local_device`. NCCL where there is CUDA, gloo elsewhere; OMP_NUM_THREADS threads.
    """
    device = local_device(kind)
    if "OMP_NUM_THREADS" in os.environ:
        # torch may have been imported, and have made its threads, before the launcher's arithmetic set the variable.
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
        # DeepSpeed asks for hardware fp16; torch computes it on any CPU, only slowly.
        deepspeed.get_accelerator().is_fp16_supported = lambda: True
    logging.getLogger("DeepSpeed").setLevel(_QUIET)
    veto_cpp_communication()
    if not dist.is_initialized():
        _default_environment()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_s)
        )
    deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    _complete_grid()
    return device


def stop_distributed() -> None:
    """Leave the job; silent where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


_turns = itertools.count()


@contextlib.contextmanager
def main_rank_first() -> Iterator[None]:
    """Rank 0 of the job does the block before the others do; also when it fails in it. Collective.

    Not a barrier: who is asked to stop leaves it at once, and nobody waits for one that has left.
    """
    key = f"megatron/turn/{next(_turns)}"
    store = dist.distributed_c10d._get_default_store()  # type: ignore[attr-defined]
    is_main = dist.get_rank() == 0
    pause_s = min(_LONGEST_TURN_POLL_S, _TURN_POLL_S + _TURN_POLL_S_PER_RANK * dist.get_world_size())
    while not is_main and not store.check([key]):
        time.sleep(pause_s)
    try:
        yield
    finally:
        if is_main:
            store.set(key, "done")


def veto_cpp_communication() -> None:
    """Keep DeepSpeed from building its shared-memory extension (deepspeed.ops probes lazily, hence the first line)."""
    deepspeed.ops.__compatible_ops__  # noqa: B018
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _default_environment() -> None:
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])


def _complete_grid() -> None:
    # DeepSpeed 0.19.8's grid lacks a method that its own activation checkpointing asks for.
    if not hasattr(PipelineParallelGrid, "get_tensor_model_parallel_group"):
        PipelineParallelGrid.get_tensor_model_parallel_group = PipelineParallelGrid.get_slice_parallel_group
