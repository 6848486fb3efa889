"""How many processes there are, how they divide into stages, replicas and tensor ranks, and the batch triple.

Starts nothing. Invariant: world_size = stages * dp * tp and train_batch_size = micro * accumulation * dp, always whole.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron.common.devices import count_gpus
from megatron.config.draft import Draft
from megatron.config.hosts import HostfileError, default_hostfile, read_hosts


@dataclass(frozen=True)
class Machine:
    """What the caller knows about the processes. devices: their number, overriding everything else.

    planning: a layout larger than this machine is no error; the smallest world that fits it is taken.
    single_replica: as many processes as one replica needs, whatever else is set.
    """

    devices: int | None = None
    planning: bool = False
    single_replica: bool = False


def derive_launcher(draft: Draft, machine: Machine) -> None:
    """One launcher out of `launcher`, `deepspeed_slurm` and `deepspeed_mpi`; and the hostfile that it reads."""
    for name, is_set, meanings in (
        ("deepspeed_slurm", draft["deepspeed_slurm"], ("slurm",)),
        ("deepspeed_mpi", draft["deepspeed_mpi"], ("openmpi", "mpich", "mvapich", "impi")),
    ):
        if is_set and (draft.is_given("launcher") or draft["launcher"] != "pdsh") and draft["launcher"] not in meanings:
            place = "launcher" if draft.is_given("launcher") else "deepspeed_slurm"
            draft.fail(
                name,
                f"{name} = true is for launcher = {' or '.join(meanings)}, and launcher = {draft['launcher']} "
                f"({draft.place(place)}). Remove one of the two.",
            )
        if is_set:
            draft.derive("launcher", meanings[0], name)
    if machine.devices is not None or machine.single_replica:
        return
    if draft["launcher"] == "slurm":
        if draft["hostfile"] is not None:
            draft.warn("hostfile", "hostfile has no effect with launcher = slurm: the allocation says which hosts")
    elif draft["hostfile"] is None and (found := default_hostfile(os.environ)) is not None:
        draft.derive("hostfile", found[0], found[1])


def derive_world(draft: Draft, machine: Machine) -> None:
    """device, world_size and data_parallel_size."""
    gpus = 0 if draft["device"] == "cpu" else _gpus_per_host(draft, machine)
    if draft["device"] == "auto":
        draft.values["device"] = "cuda" if gpus else "cpu"
        draft.origins["device"] = "derived from the GPUs found"
        if draft["hostfile"] is not None and draft["launcher"] != "slurm" and not gpus:
            draft.warn(
                "hostfile", "this host has no GPU, so all hosts compute on their CPUs; device: cuda says otherwise"
            )
    stages, tp = max(1, draft["pipe_parallel_size"]), draft["model_parallel_size"]
    replica = stages * tp
    world, source, settled = _count_processes(draft, machine, gpus, replica)
    if world % replica:
        text = (
            f"pipe_parallel_size * model_parallel_size = {stages} * {tp} = {replica} does not divide the {world} "
            f"process{'es' if world != 1 else ''} ({source}). "
        )
        if machine.planning and not settled:
            draft.warnings.append(
                f"planning for {replica} processes, the fewest this layout needs; found are {world} ({source})"
            )
            world = replica
        else:
            place = "model_parallel_size" if tp > 1 else "pipe_parallel_size"
            draft.fail(place, text + f"Use a multiple of {replica} processes, or sizes whose product divides {world}.")
    draft.derive("world_size", world, source)
    draft.derive("data_parallel_size", world // replica, f"{world} / ({stages} * {tp})")


def _count_processes(draft: Draft, machine: Machine, gpus: int, replica: int) -> tuple[int, str, bool]:
    """Processes, where the number comes from, and whether someone asked for exactly it."""
    if machine.devices is not None:
        return machine.devices, "given by the launcher", True
    if machine.single_replica:
        return replica, "one replica", True
    if draft.is_given("global_num_gpus"):
        return draft["global_num_gpus"], "global_num_gpus", True
    per_host = draft["num_gpus"]
    if draft["launcher"] == "slurm" and (allocated := allocated_nodes(os.environ)):
        nodes = draft["num_nodes"] if draft["num_nodes"] > 0 else allocated
        if nodes > allocated:
            draft.fail(
                "num_nodes", f"num_nodes = {nodes}, and the allocation has {allocated}. Ask Slurm for more, or less."
            )
        if per_host is None:
            per_host = gpus if draft["device"] == "cuda" else draft["cpu_processes"]
        if per_host is None:
            per_host = math.ceil(replica / nodes)
        return per_host * nodes, f"{per_host} on each of {nodes} nodes of the allocation", True
    if machine.planning and draft["hostfile"] is not None and not Path(draft["hostfile"]).exists():
        draft.warn(
            "hostfile",
            f"hostfile = {draft['hostfile']} is not here; planning for {replica} process"
            f"{'es' if replica != 1 else ''}, the fewest this layout needs. --gpus N says how many there will be",
        )
        return replica, "the layout", False
    if draft["hostfile"] is not None and draft["launcher"] != "slurm":
        try:
            hosts = read_hosts(draft["hostfile"], draft["include"], draft["exclude"], draft["num_nodes"])
        except HostfileError as error:
            draft.fail("hostfile", str(error))
        return (per_host * len(hosts) if per_host else sum(hosts.values())), "hostfile", True
    nodes = max(1, draft["num_nodes"])
    if per_host is not None:
        return per_host * nodes, "num_gpus * num_nodes", True
    if draft["device"] == "cuda":
        if not gpus and not machine.planning:
            draft.fail(
                "device", "device = cuda, and no GPU is found on this host. Use device: auto, or check the driver."
            )
        return max(1, gpus) * nodes, f"{gpus} GPU{'s' if gpus != 1 else ''} found", False
    if draft.is_given("cpu_processes"):
        return draft["cpu_processes"] * nodes, "cpu_processes", not machine.planning
    draft.derive("cpu_processes", replica, "one replica")
    return replica * nodes, "one replica on the CPU", False


def allocated_nodes(environment: Mapping[str, str]) -> int:
    """Nodes of the Slurm allocation that this process runs in, or 0 outside one."""
    return int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 0)


def _gpus_per_host(draft: Draft, machine: Machine) -> int:
    """What one host offers: this one, or with launcher = slurm one of the allocation, which may be elsewhere."""
    if draft["launcher"] == "slurm" and machine.devices is None:
        for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
            # Reads `4`, or `a100:4`.
            if found := re.search(r"(\d+)$", os.environ.get(name, "")):
                return int(found[1])
    return count_gpus()


def derive_batch(draft: Draft) -> None:
    """Solve train_batch_size = micro * accumulation * dp for what is unset, or check it.

    Any one or two of the three suffice; an unset accumulation is solved before it is taken to be 1.
    """
    dp = draft["data_parallel_size"]
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    train, micro, steps = (draft[name] for name in names)
    if train is None and micro is None and steps is None:
        draft.derive(names[1], 1, "the default of 1, as no batch size is set")
        micro = 1
    if train is None:
        micro, steps = micro or 1, steps or 1
        train = micro * steps * dp
    elif micro is None and steps is None:
        _require_multiple(draft, train, dp, f"data_parallel_size = {dp}")
        micro, steps = train // dp, 1
    elif steps is None:
        _require_multiple(
            draft,
            train,
            micro * dp,
            f"train_micro_batch_size_per_gpu * data_parallel_size = {micro} * {dp} = {micro * dp}",
        )
        steps = train // (micro * dp)
    elif micro is None:
        _require_multiple(
            draft,
            train,
            steps * dp,
            f"gradient_accumulation_steps * data_parallel_size = {steps} * {dp} = {steps * dp}",
        )
        micro = train // (steps * dp)
    if train != micro * steps * dp:
        fitting = f"train_batch_size: {micro * steps * dp}"
        if train % (micro * dp) == 0:
            fitting += f", or gradient_accumulation_steps: {train // (micro * dp)}"
        draft.fail(
            names[0],
            f"train_batch_size = {train} is not train_micro_batch_size_per_gpu * gradient_accumulation_steps * "
            f"data_parallel_size = {micro} * {steps} * {dp} = {micro * steps * dp}. Set {fitting}, or remove one of "
            "the three.",
        )
    for name, value in zip(names, (train, micro, steps), strict=True):
        draft.derive(name, value, "the batch equation")


def _require_multiple(draft: Draft, train: int, divisor: int, what: str) -> None:
    if train % divisor:
        below = train // divisor * divisor
        near = " or ".join(str(n) for n in (below, below + divisor) if n)
        draft.fail(
            "train_batch_size",
            f"train_batch_size = {train} is not a multiple of {what}. Set train_batch_size to {near}.",
        )


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple that is not below `value`."""
    return math.ceil(value / multiple) * multiple
