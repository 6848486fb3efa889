"""Runs that continue, on every rank of a warm pool: what they say, and from which state they go on."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

from megatron.checkpoint import open_checkpoint
from megatron.cli import train as command
from megatron.common.errors import MegatronError
from megatron.config import load
from megatron.engine.distributed import stop_distributed
from megatron.engine.state import import_weights
from megatron.engine.train_engine import TrainEngine
from megatron.training import resuming
from megatron.training.setup import build_run
from tests.integration.run_cases import train_run


def told_run(config_path: str, breaks_loading: bool = False) -> dict[str, Any]:
    """`train_run` of the same file, with what it says; `error` is the message of a refusal.

    breaks_loading: one of the loaded weights is not what the checkpoint holds.
    """
    if breaks_loading:
        resuming.import_weights = _import_wrongly
    said = io.StringIO()
    result: dict[str, Any] = {"error": None}
    with contextlib.redirect_stdout(said):
        try:
            result |= train_run(config_path)
        except MegatronError as error:
            result["error"] = str(error)
    return {**result, "said": said.getvalue()}


def refusals(config_paths: list[str]) -> list[str]:
    """What each run says in order not to begin; "" for one that would."""
    said = []
    for path in config_paths:
        try:
            build_run(load([path], devices=int(os.environ["WORLD_SIZE"]))).close()
            said.append("")
        except MegatronError as error:
            said.append(str(error))
    stop_distributed()
    return said


def exit_code(arguments: list[str]) -> int:
    """`train.py` with these arguments."""
    return command.main(arguments)


def _import_wrongly(engine: TrainEngine, source: Any, **options: Any) -> None:
    import_weights(engine, source, **options)
    # In half precision a model that has hardly learnt shows little: a larger mistake.
    wrong = "layers.1.mlp.linear2.weight" if engine.options.precision == "fp32" else "head.weight"
    for name, parameter in engine.named_parameters:
        if name == wrong:
            parameter.data.mul_(8.0)


def state_of(folder: str, step: int) -> dict[str, Any]:
    """What the manifest of a checkpoint says beside the tensors."""
    return open_checkpoint(folder, step).state
