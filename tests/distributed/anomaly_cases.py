"""A NaN in one step on one rank; runs on every rank of a warm pool."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from megatron.data.loader import Batch
from megatron.engine.origin import find_origin
from megatron.engine.state import optimizer_steps
from megatron.engine.step_guard import accept_finite
from megatron.engine.train_engine import TrainEngine
from tests.distributed.layout_cases import Case, fragments, learning_rate, make_engine, rank_batches

BAD_STEP = 2


def snapshot(engine: TrainEngine) -> dict[tuple[str, str, int], bytes]:
    """The bits of masters, moments and weights that this rank holds."""
    bits = {(f.kind, f.name, f.start): f.values.tobytes() for f in fragments(engine)}
    for name, parameter in engine.named_parameters:
        held = parameter.ds_tensor if engine.is_fully_sharded else parameter  # type: ignore[attr-defined]
        bits["held", name, 0] = held.detach().float().numpy().tobytes()
    return bits


def poison(engine: TrainEngine, batches: list[Batch], kind: str, name: str, rank: int) -> tuple[list[Batch], list[Any]]:
    """The batches to train on, and hooks to remove: NaN on one rank in a gradient, an output, or a batch's mask."""
    if dist.get_rank() != rank:
        return batches, []
    if kind == "batch":
        bad = dataclasses.replace(batches[-1], loss_mask=torch.full_like(batches[-1].loss_mask, float("nan")))
        return [*batches[:-1], bad], []
    parameter = dict(engine.named_parameters)[name]
    if kind == "gradient":
        return batches, [parameter.register_hook(lambda gradient: torch.full_like(gradient, float("nan")))]
    (owner,) = [m for m in engine.module.modules() if any(p is parameter for p in m.parameters(recurse=False))]
    return batches, [owner.register_forward_hook(lambda module, inputs, output: output * float("inf"))]


def trained_past(case: Case, kind: str, name: str = "", rank: int = 0, refuses: bool = False) -> dict[str, Any]:
    """Train with one bad step, look for its origin, and train without that step; compare the two.

    refuses: instead of a NaN, a judge refuses the step.
    """
    outcome: dict[str, Any] = {"skipped": [], "lowered": []}
    engine = make_engine(case)
    for step in range(case.steps):
        batches, hooks = rank_batches(step, case, engine.groups.dp_rank), []
        is_bad = step == BAD_STEP
        if is_bad:
            before = snapshot(engine)
            scale_before = engine.loss_scale_state()
            if not refuses:
                batches, hooks = poison(engine, batches, kind, name, rank)
        random_states = engine.stream.capture()
        judge = (lambda loss, norm: False) if refuses and is_bad else accept_finite
        result = engine.train_step(batches, learning_rate(step), judge)
        outcome["skipped"].append(result.is_skipped)
        outcome["lowered"].append(result.is_scale_lowered)
        if is_bad:
            outcome["loss"], outcome["norm"] = result.loss, result.grad_norm
            outcome["kept"] = snapshot(engine) == before
            scale_after = engine.loss_scale_state()
            outcome["scale kept"] = scale_after == scale_before
            outcome["origin"] = str(find_origin(engine, batches, random_states))
            outcome["kept in rehearsal"] = snapshot(engine) == before
        for hook in hooks:
            hook.remove()
    outcome["optimizer_steps"] = optimizer_steps(engine)
    spared = make_engine(case)
    for step in range(case.steps):
        if step == BAD_STEP:
            # Another scale rounds other gradients to zero.
            spared.restore_loss_scale(scale_after)
            continue
        spared.train_step(rank_batches(step, case, spared.groups.dp_rank), learning_rate(step))
    outcome["equals spared"] = snapshot(engine) == snapshot(spared)
    return outcome
