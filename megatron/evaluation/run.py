"""Evaluate a model that is in memory: on its own, or in the middle of training without disturbing it.

Invariant: afterwards the model's mode and every random generator are as they were, on every rank.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron.evaluation.generation import generate_batch
from megatron.evaluation.scoring import score_batch
from megatron.evaluation.team import Team
from megatron.model.build import Transformer
from megatron.parallel.process_groups import ProcessGroups
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: lm-eval's objects on rank 0, None on the others."""

    loaded: Any


def load_tasks(names: Sequence[str], groups: ProcessGroups, device: torch.device, data_dir: str | None = None) -> Tasks:
    """Load tasks before the model is there, so that a wrong name costs nothing. Collective.

    names: tasks, groups, patterns, YAML files. data_dir: where our own tasks find their data (unset: DATA_DIR, ./data).
    Raises: MegatronError (no lm-eval), ConfigError (unknown task), DataError (a task's data), on every rank.
    """

    def select() -> Any:
        # Here and not at the top: lm-eval is optional, takes seconds to import, and only rank 0 needs it.
        from megatron.evaluation import harness

        return harness.select_tasks(names, data_dir)

    with _same_generators(device):
        return Tasks(Team(groups, {}, device).lead(select))


def evaluate_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[str] | Tasks,
    *,
    batch_size: int,
    max_length: int | None = None,
    limit: int | None = None,
    bootstrap_iters: int = 10_000,
    info: Mapping[str, Any] | None = None,
    is_quiet: bool = False,
    asked: Callable[[], int] = lambda: 0,
) -> dict[str, Any] | None:
    """lm-eval's results on rank 0, None on the others. Collective.

    Parallel: every rank holds the model or its tensor-parallel shard of it, without pipeline stages; data-parallel
    replicas share the work. The scores are the same at any number of ranks.
    tasks: what `load_tasks` gave, or its names. batch_size: rows of one forward. max_length: longest row in tokens
    (unset: the model's positions); a model that learnt from shorter sequences does badly beyond them.
    limit: only the first documents of each task. bootstrap_iters: resamplings for the standard error of metrics that
    have no formula. info: facts about the model for the results' "config". asked: the signal that asks this rank to
    stop, or 0; polled between batches.
    Raises: what `load_tasks` raises, DataError where a task asks for more positions than there are, and Stopped when a
    rank was asked to stop, on every rank.
    """
    groups, device = model.groups, model.output_weight.device
    if groups.topology.pp_size > 1:
        # From a checkpoint, stages are folded into replicas; who trains in stages has no whole model to give.
        raise ValueError(f"a model without pipeline stages is required, not one of {groups.topology}")
    chosen = tasks if isinstance(tasks, Tasks) else load_tasks(tasks, groups, device)
    work = {
        "score": lambda rows: score_batch(model, rows),
        "generate": lambda requests: generate_batch(model, tokenizer, requests),
    }
    team = Team(groups, work, device, asked)

    def drive() -> dict[str, Any]:
        from megatron.evaluation import harness

        adapter = harness.HarnessModel(
            team.map,
            tokenizer,
            max_length=min(max_length or model.spec.max_text_positions, model.spec.max_text_positions),
            batch_size=batch_size,
            device=device,
            info={"model_dtype": str(model.output_weight.dtype), **(info or {})},
            is_quiet=is_quiet,
        )
        return harness.run(adapter, chosen.loaded, limit=limit, bootstrap_iters=bootstrap_iters)

    with _evaluating(model), _same_generators(device):
        results: dict[str, Any] | None = team.lead(drive)
    return results


@contextlib.contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def _same_generators(device: torch.device) -> Iterator[None]:
    """Leave Python's, NumPy's and torch's generators as they were; even loading a dataset draws from them."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
