"""Deliberate mistakes, made on the ranks of a case, that the matrix and `check_replicas` must catch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

import megatron.model.norms as norms
import megatron.parallel.layers as layers
from megatron.common.errors import ReplicaError
from megatron.config import load
from megatron.data.loader import Batch
from megatron.engine.distributed import stop_distributed
from megatron.engine.replicas import ReplicaCheck
from megatron.engine.step_guard import Judge, accept_finite
from megatron.engine.train_engine import StepResult, TrainEngine
from megatron.training import loop
from megatron.training.setup import build_run
from tests.distributed.layout_cases import Case, learning_rate, make_engine, rank_batches, train_case


def forget_norm_reduction() -> None:
    """Sequence parallelism without the sum over tensor-parallel ranks of the norms' gradients."""
    norms.shared_parameter = layers.shared_parameter = lambda parameter, groups: parameter  # type: ignore[assignment]


def train_with_forgotten_norms(case: Case) -> dict[str, Any]:
    """`train_case` with the mistake."""
    forget_norm_reduction()
    return train_case(case)


def train_with_halved_gradient(case: Case) -> dict[str, Any]:
    """`train_case` in which one data-parallel rank's gradients count half."""
    original = TrainEngine._prepare

    def halved(self: TrainEngine, batches: Any) -> Any:
        prepared = original(self, batches)
        factor = 2.0 if self.groups.dp_rank == 1 and torch.is_grad_enabled() else 1.0
        return [(*inputs[:-1], inputs[-1] * factor) for inputs in prepared]

    TrainEngine._prepare = halved  # type: ignore[method-assign]
    return train_case(case)


def nudge_weight(engine: TrainEngine, name: str) -> None:
    """The smallest change of one element of this rank's copy of a weight."""
    parameter = dict(engine.named_parameters)[name]
    with torch.no_grad():
        flat = parameter.data.view(-1)
        flat[3] = torch.nextafter(flat[3], flat.new_tensor(torch.inf))


def nudge_master(engine: TrainEngine, name: str) -> None:
    """The same for the fp32 master, where this rank has its first element."""
    mapping = dict(engine.named_parameters)[name]._hp_mapping  # type: ignore[attr-defined]
    if mapping is not None and mapping.lp_fragment_address.start == 0:
        with torch.no_grad():
            value = mapping.hp_fragment[0]
            mapping.hp_fragment[0] = torch.nextafter(value, value.new_tensor(torch.inf))


NUDGES: dict[str, Callable[[TrainEngine, str], None]] = {"weight": nudge_weight, "master": nudge_master}


def checked_training(case: Case, interval: int, mistake: str = "", rank: int = 0, name: str = "", at: int = 0) -> str:
    """Train with the check; return its message, or "" if it found nothing.

    mistake: "", "norms" (the whole run), or one of NUDGES, which is made on one rank before step `at`.
    """
    if mistake == "norms":
        forget_norm_reduction()
    engine = make_engine(case)
    check = ReplicaCheck(engine, interval)
    for step in range(case.steps):
        if mistake in NUDGES and step + 1 == at and dist.get_rank() == rank:
            NUDGES[mistake](engine, name)
        try:
            with check.around(step + 1):
                engine.train_step(rank_batches(step, case, engine.groups.dp_rank), learning_rate(step))
        except ReplicaError as error:
            return str(error)
    return ""


def run_that_strays(config_file: str, at: int) -> tuple[int, str, int]:
    """A whole run from a YAML file, in which rank 1's copy of a weight is nudged before step `at`.

    Returns the exit code of the error (0 without), its text, and the step that was reached.
    """
    run = build_run(load([config_file], devices=dist.get_world_size()))
    train_step = run.engine.train_step

    def nudging(batches: Sequence[Batch], learning_rate: float, judge: Judge = accept_finite) -> StepResult:
        result = train_step(batches, learning_rate, judge)
        if run.position.step + 1 == at - 1 and dist.get_rank() == 1:
            nudge_weight(run.engine, "layers.0.mlp.linear1.weight")
        return result

    run.engine.train_step = nudging  # type: ignore[method-assign]
    try:
        loop.train(run)
    except ReplicaError as error:
        return error.exit_code, str(error), run.position.step
    finally:
        run.close()
        stop_distributed()
    return 0, "", run.position.step


def watched_gradients(case: Case) -> set[str]:
    """Of which tensors the check has seen a gradient that is not zero, on this rank, in one step."""
    engine = make_engine(case)
    check = ReplicaCheck(engine, 1)
    with check.around(1):
        engine.train_step(rank_batches(0, case, engine.groups.dp_rank), learning_rate(0))
    return {name for (_, name), value in check._gradients.items() if value}
