"""Functions that the tests of the pool run on its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import torch
import torch.distributed as dist


def coordinates() -> tuple[int, int, int, str]:
    """Where this process believes to be, and its parent's preloaded state."""
    return dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), os.environ["MASTER_ADDR"]


def reduced_sum(scale: float) -> torch.Tensor:
    """The sum over ranks of `(rank + 1) * scale * [0, 1, 2]`."""
    tensor = torch.arange(3.0) * (dist.get_rank() + 1) * scale
    dist.all_reduce(tensor)
    return tensor


def generators() -> tuple[float, int]:
    """A draw from torch, and how many threads torch would use."""
    return torch.rand(()).item(), torch.get_num_threads()


def fail_on(rank: int) -> None:
    """One rank raises; the others wait for it in a collective."""
    if dist.get_rank() == rank:
        print("a line on stdout")
        raise ArithmeticError("the planted failure")
    dist.barrier()


def die_on(rank: int) -> None:
    """One rank is killed without a word; the others wait for it in a collective."""
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on(rank: int) -> int:
    """One rank never reaches the collective of the others."""
    if dist.get_rank() == rank:
        _the_function_that_waits()
    dist.barrier()
    return rank


def _the_function_that_waits() -> None:
    time.sleep(3600)


def start_descendant(folder: str) -> None:
    """Start a process that would outlive the rank, and note its id."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(os.path.join(folder, f"pid{dist.get_rank()}"), "w") as stream:
        stream.write(str(child.pid))


def unpicklable() -> object:
    """A value that cannot travel."""
    return lambda: None


def train_with_deepspeed(steps: int) -> tuple[float, list[float]]:
    """A few ZeRO-1 steps of a linear model on rank-dependent data; the last loss and the final weights."""
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1, bias=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    generator = torch.Generator().manual_seed(dist.get_rank())
    loss = torch.zeros(())
    for _ in range(steps):
        inputs = torch.randn(2, 8, generator=generator)
        loss = (engine(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
    return loss.item(), model.weight.detach().flatten().tolist()
