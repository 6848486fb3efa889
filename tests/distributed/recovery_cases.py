"""Whole runs whose data holds samples that make the loss NaN; run on every rank of a warm pool."""

from __future__ import annotations

import dataclasses
import errno
import os
from typing import Any

import torch

from megatron.checkpoint.storage import Storage
from megatron.common.errors import MegatronError
from megatron.config import load
from megatron.data.loader import Batch
from megatron.engine.distributed import stop_distributed
from megatron.training import loop
from megatron.training.reliability import recovery
from megatron.training.setup import build_run
from tests.integration.saving_cases import watch


def run_over(
    config_file: str, bad: tuple[int, int] | None = None, consumed: int | None = None, full_at: str = ""
) -> dict[str, Any]:
    """Train as the file says; samples [bad[0], bad[1]) have a NaN in their mask.

    consumed: go on at this sample, whatever the checkpoint says. full_at: the disk is full when rank 0 creates a file
    whose path holds these characters; "roll-back": at the pointer that a roll-back sets.
    Returns the exit code and text of the error (0 and "" without), the samples of every step in the order of time, the
    position, and all messages.
    """
    if full_at == "roll-back":
        recovery.Storage = type("FullStorage", (Storage,), {"replace_text": _no_space})  # type: ignore[misc]
    elif full_at and os.environ["RANK"] == "0":
        watch(lambda operation, path: _no_space() if operation == "create" and full_at in str(path) else None)
    run = build_run(load([config_file], devices=int(os.environ["WORLD_SIZE"])))
    if consumed is not None:
        run.position.consumed_samples = consumed
    read, samples, said = run.train.step_batches, [], []

    def reading(consumed_samples: int) -> list[Batch]:
        samples.append(consumed_samples)
        batches = read(consumed_samples)
        if bad is None:
            return batches
        return [
            dataclasses.replace(batch, loss_mask=torch.full_like(batch.loss_mask, float("nan")))
            if any(bad[0] <= sample < bad[1] for sample in batch.sample_ids)
            else batch
            for batch in batches
        ]

    run.train.step_batches = reading  # type: ignore[method-assign]
    run.reporter.message = said.append  # type: ignore[assignment,method-assign]
    outcome: dict[str, Any] = {"code": 0, "error": ""}
    try:
        loop.train(run)
    except MegatronError as error:
        outcome = {"code": error.exit_code, "error": str(error)}
    finally:
        run.close()
    outcome |= {"samples": samples, "said": said, "position": dataclasses.asdict(run.position)}
    outcome |= {"skipped": run.anomalies.num_skipped, "rollbacks": run.anomalies.rollbacks}
    stop_distributed()
    return outcome


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
