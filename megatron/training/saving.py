"""What a checkpoint of a run says beside its tensors, and how it is written.

Not here: continuing from one (megatron.training.resuming), the file format (megatron.checkpoint), and where tensors
lie in DeepSpeed (megatron.engine.state).
Invariant: position in the data is the number of consumed samples, so it does not depend on the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron.checkpoint import Location, Retention, Saved, Verified, save
from megatron.checkpoint.random_state import capture
from megatron.engine.state import export_pieces, optimizer_steps
from megatron.engine.train_engine import TrainEngine
from megatron.model.build import parameter_names, vocabulary_parameters
from megatron.training.forward_check import STATE, forward_pass


@dataclass
class Position:
    """How far a run has come, over all its starts.

    step: optimizer steps, skipped ones included. consumed_samples: sequences of the training order. consumed_tokens:
    tokens of these. elapsed_s: time in the
    training loop, validating and saving included, the time between starts not. validation_due: the validation (and
    test) of this step is still to be made, as the run was stopped before its end.
    anomalies: what the anomaly policy remembers (megatron.training.reliability.anomaly).
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    elapsed_s: float = 0.0
    validation_due: bool = False
    anomalies: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveOptions:
    """Where and what to write.

    facts: what must not change silently between saving and resuming, by name (fingerprints of data and tokenizer).
    about: further JSON values kept for people and tools (schedule, versions of settings).
    is_async: write in the background (async_save). on_failure: what a failed save does to the run (on_save_failure).
    checks_forward: store what a fixed forward pass gives (see megatron.training.forward_check).
    """

    folder: Location | None
    retention: Retention = field(default_factory=Retention)
    source_files: Sequence[tuple[str, str]] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    with_rng: bool = True
    is_async: bool = False
    on_failure: Literal["stop", "continue"] = "stop"
    checks_forward: bool = False


def agree(ok: bool, device: torch.device) -> bool:
    """Whether all ranks are well. Collective; no rank passes before all have come."""
    verdict = torch.tensor(1 if ok else 0, dtype=torch.int32, device=device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict.item())


def share(text: str, group: dist.ProcessGroup | None = None) -> list[str]:
    """The texts of all ranks, by global rank. Collective; no rank passes before all have come."""
    texts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    return texts


def contents(engine: TrainEngine, position: Position, options: SaveOptions) -> dict[str, Any]:
    """What a checkpoint of this moment holds beside the pieces: arguments of `megatron.checkpoint.save`."""
    spec = engine.spec
    state = {
        "model_spec": spec.to_dict(),
        "position": asdict(position),
        "optimizer_steps": optimizer_steps(engine),
        "loss_scale": engine.loss_scale_state(),
        "layout": {
            "tp": engine.groups.tp_size,
            "pp": engine.groups.topology.pp_size,
            "dp": engine.groups.dp_size,
            "precision": engine.options.precision,
        },
        **({STATE: forward_pass(engine)} if options.checks_forward else {}),
        "facts": options.facts,
        **options.about,
    }
    return {
        "state": state,
        "rank": engine.groups.global_rank,
        "world_size": engine.groups.topology.world_size,
        "source_files": options.source_files,
        "rank_tensors": {**capture(), "divided": engine.stream.state.clone()} if options.with_rng else None,
        "used_rows": dict.fromkeys(vocabulary_parameters(spec), spec.vocab_size),
        # A stage that gives nothing for one of its tensors would else leave a checkpoint that looks whole.
        "expected_names": parameter_names(spec),
        "retention": _keeping_the_way_back(options.retention, position),
    }


def _keeping_the_way_back(retention: Retention, position: Position) -> Retention:
    """Spare the checkpoint that a roll-back would go to while there are bad steps that could lead to one."""
    bad_steps = position.anomalies.get("bad_steps")
    if not bad_steps:
        return retention
    # The same choice as that of megatron.training.reliability.recovery.
    further_back = position.anomalies.get("recent_rollbacks", 0)
    return replace(retention, keep_before=bad_steps[0], num_before=1 + further_back)


def save_run(
    engine: TrainEngine, position: Position, options: SaveOptions, verified: Verified | None = None
) -> Saved | None:
    """Write a checkpoint of this moment; None where the run has no save folder. Collective.

    Raises: CheckpointError on all ranks.
    """
    if options.folder is None:
        return None
    return save(
        options.folder,
        position.step,
        export_pieces(engine),
        share=share,
        verified=verified,
        **contents(engine, position, options),
    )
