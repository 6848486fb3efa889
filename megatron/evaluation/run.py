"""Evaluate a model that is in memory: on its own, or in the middle of training without disturbing it.

Invariant: afterwards the model's mode and every random generator are as they were, on every rank.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from megatron.evaluation.generation import generate_batch
from megatron.evaluation.scoring import score_batch
from megatron.evaluation.team import Team
from megatron.model.build import Transformer
from megatron.tokenizer.base import Tokenizer


def evaluate_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    batch_size: int,
    data_dir: str | None = None,
    limit: int | None = None,
    bootstrap_iters: int = 10_000,
    info: Mapping[str, Any] | None = None,
    is_quiet: bool = False,
) -> dict[str, Any] | None:
    """lm-eval's results of `tasks` (names, patterns, YAML files), on rank 0; None on the others. Collective.

    Parallel: every rank holds the model or its tensor-parallel shard of it, without pipeline stages; data-parallel
    replicas share the work. The scores are the same at any number of ranks.
    batch_size: rows of one forward. data_dir: where our own tasks find their data (unset: DATA_DIR, ./data).
    limit: only the first documents of each task. bootstrap_iters: resamplings for the standard error of metrics that
    have no formula. info: facts about the model for the results' "config".
    Raises: MegatronError (no lm-eval), ConfigError (unknown task), DataError (a task's data), on every rank.
    """
    groups = model.groups
    if groups.topology.pp_size > 1:
        # From a checkpoint, stages are folded into replicas; a caller that trains in stages has no whole model to give.
        raise ValueError(f"a model without pipeline stages is required, not one of {groups.topology}")
    work = {
        "score": lambda rows: score_batch(model, rows),
        "generate": lambda prompts: generate_batch(model, tokenizer, prompts),
    }
    team = Team(groups, work, model.output_weight.device)

    def drive() -> dict[str, Any]:
        # Here and not at the top: lm-eval is optional, takes seconds to import, and only rank 0 needs it.
        from megatron.evaluation import harness

        adapter = harness.HarnessModel(
            team.map,
            tokenizer,
            max_length=model.spec.max_positions,
            batch_size=batch_size,
            device=model.output_weight.device,
            info={"model_dtype": str(model.output_weight.dtype), **(info or {})},
            is_quiet=is_quiet,
        )
        return harness.run(adapter, harness.select_tasks(tasks, data_dir), limit=limit, bootstrap_iters=bootstrap_iters)

    with _undisturbed(model):
        return team.lead(drive)


@contextlib.contextmanager
def _undisturbed(model: Transformer) -> Iterator[None]:
    was_training = model.training
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [model.output_weight.device] if model.output_weight.is_cuda else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(was_training)
        random.setstate(python_state)
        np.random.set_state(numpy_state)
