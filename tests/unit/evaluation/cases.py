"""What the tests run on every rank."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from megatron.common.errors import DataError, Stopped
from megatron.evaluation.run import evaluate_tasks, load_tasks
from megatron.evaluation.team import Team
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from tests.unit.evaluation import tiny


def evaluate(tp_size: int, tokenizer_file: str, data_dir: str, tasks: list[str], limit: int | None = None) -> Any:
    """The scores of one evaluation; None on the ranks that serve."""
    groups = ProcessGroups.build(Topology(1, dist.get_world_size() // tp_size, tp_size))
    loaded = load_tasks(tasks, groups, torch.device("cpu"), data_dir)
    results = evaluate_tasks(
        tiny.model(groups), tiny.tokenizer(tokenizer_file), loaded, batch_size=3, limit=limit, is_quiet=True
    )
    return None if results is None else results["results"]


def map_squares(count: int) -> Any:
    """Squares of numbers, and which rank made each; None on the ranks that serve."""
    team = _team({"square": lambda number: (number * number, dist.get_rank())})
    heard: list[int] = []
    results = team.lead(lambda: team.map("square", list(range(count)), heard.append))
    return None if results is None else (results, sum(heard))


def fail_on(rank: int) -> str:
    """What each rank raises when the work fails on one of them."""

    def work(number: int) -> int:
        if dist.get_rank() == rank:
            raise ArithmeticError(f"cannot do {number}")
        return number

    team = _team({"square": work})
    return _message_of(lambda: team.lead(lambda: team.map("square", list(range(9)))))


def fail_before_work() -> str:
    """What each rank raises when rank 0 finds a problem of its own."""

    def task() -> None:
        raise DataError("no such file")

    team = _team({})
    return _message_of(lambda: team.lead(task))


def stop_on(rank: int, number: int, tp_size: int) -> tuple[int, int]:
    """Which signal each rank was stopped by, and how many chunks it did; `rank` is asked during its third.

    As in a model, tensor-parallel ranks need each other for every chunk.
    """
    groups = ProcessGroups.build(Topology(1, dist.get_world_size() // tp_size, tp_size))
    done: list[int] = []

    def work(chunk: int) -> None:
        if groups.tp is not None:
            dist.barrier(groups.tp)
        done.append(chunk)

    def asked() -> int:
        return number if dist.get_rank() == rank and len(done) >= 3 else 0

    team = Team(groups, {"work": work}, torch.device("cpu"), asked)
    try:
        team.lead(lambda: team.map("work", list(range(1000))))
    except Stopped as stop:
        return stop.number, len(done)
    return 0, len(done)


def _team(work: dict[str, Any]) -> Team:
    return Team(ProcessGroups.build(Topology(1, dist.get_world_size(), 1)), work, torch.device("cpu"))


def _message_of(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return json.dumps([type(error).__name__, str(error)])
    return "nothing was raised"
