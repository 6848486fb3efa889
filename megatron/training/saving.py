"""What a checkpoint of a run says beside its tensors, how it is written, and how a run continues from it.

Not here: the file format (megatron.checkpoint) and where tensors lie in DeepSpeed (megatron.engine.state).
Invariant: position in the data is the number of consumed samples, so it does not depend on the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron.checkpoint import Location, Retention, Saved, Verified, save
from megatron.checkpoint.random_state import capture, restore
from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader, ForeignReader
from megatron.convert.neox_layers import GroupedLayout
from megatron.convert.open import foreign_folder, open_weights
from megatron.engine.state import export_pieces, import_optimizer, import_weights, optimizer_steps
from megatron.engine.train_engine import TrainEngine
from megatron.model.build import parameter_names, vocabulary_parameters
from megatron.model.lora import is_update
from megatron.model.spec import ModelSpec

# Fields that change what is regularised or how weights start, but not which function the weights mean.
_FREE_FIELDS = frozenset(
    {"padded_vocab_size", "attention_dropout", "hidden_dropout", "init_method", "output_init_method", "init_std"}
)


@dataclass
class Position:
    """How far a run has come. `step` optimizer steps, `consumed_samples` sequences of the training order.

    validation_due: the validation (and test) of this step is still to be made, as the run was stopped before its end.
    anomalies: what the anomaly policy remembers (megatron.training.reliability.anomaly).
    """

    step: int = 0
    consumed_samples: int = 0
    validation_due: bool = False
    anomalies: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveOptions:
    """Where and what to write.

    facts: what must not change silently between saving and resuming, by name (fingerprints of data and tokenizer).
    about: further JSON values kept for people and tools (schedule, versions of settings).
    is_async: write in the background (async_save). on_failure: what a failed save does to the run (on_save_failure).
    """

    folder: Location | None
    retention: Retention = field(default_factory=Retention)
    source_files: Sequence[tuple[str, str]] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    with_rng: bool = True
    is_async: bool = False
    on_failure: Literal["stop", "continue"] = "stop"


@dataclass(frozen=True)
class LoadOptions:
    """Where to continue from, and which parts to take. grouped: as in `open_neox`."""

    folder: Location | None
    step: int | None = None
    allow_fresh_start: bool = False
    weights_only: bool = False
    grouped: GroupedLayout | None = None
    with_optimizer: bool = True
    with_rng: bool = True


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
        "retention": options.retention,
    }


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


def load_run(
    engine: TrainEngine, options: LoadOptions, facts: dict[str, Any], report: Callable[[str], None]
) -> Position:
    """Continue from the newest whole checkpoint in the folder. Collective.

    Returns the position to go on from (zero with `weights_only`, which takes nothing but the weights).
    Raises: CheckpointError if there is none and a fresh start was not allowed, or if it is of another model or of
    other data.
    """
    if options.folder is None:
        return Position()
    if options.allow_fresh_start and not _has_any(options.folder):
        report(f"no checkpoint in {options.folder} yet: starting from step 0 (allow_fresh_start)")
        return Position()
    reader = open_weights(
        options.folder,
        engine.spec,
        options.step,
        grouped=options.grouped,
        part=engine.groups.global_rank,
        parts=engine.groups.topology.world_size,
        agree=lambda ok: agree(ok, engine.device),
        report=report,
    )
    if isinstance(reader, ForeignReader) and not options.weights_only:
        raise CheckpointError(
            f"{reader.folder} is a {reader.what}: its weights can be taken, its optimizer state and position cannot. "
            "Set finetune: true to start a new run from these weights."
        )
    _check_model(reader, engine.spec, options.weights_only)
    is_new = _adds_updates(reader, engine.spec)
    import_weights(engine, reader, keeps=is_update if is_new else lambda name: False)
    if options.weights_only:
        report(f"weights from {reader.folder}; step, optimizer and data start anew (finetune)")
        return Position()
    _check_facts(reader, facts)
    if options.with_optimizer:
        import_optimizer(engine, reader, reader.state["optimizer_steps"])
        engine.restore_loss_scale(reader.state["loss_scale"])
    if options.with_rng:
        _restore_rng(engine, reader, report)
    report(f"continuing from {reader.folder}")
    return Position(**reader.state["position"])


def _has_any(folder: Location) -> bool:
    if foreign_folder(folder) is not None:
        return True
    return folder.is_dir() and any(path.name.startswith("global_step") for path in folder.iterdir())


def _restore_rng(engine: TrainEngine, reader: AnyReader, report: Callable[[str], None]) -> None:
    topology, saved = engine.groups.topology, reader.state["layout"]
    if (saved["tp"], saved["pp"], saved["dp"]) != (topology.tp_size, topology.pp_size, topology.dp_size):
        report("the layout has changed: random states (dropout) start anew, data order and weights go on exactly")
        return
    states = reader.rank_tensors(engine.groups.global_rank)
    if not states:
        raise CheckpointError(
            f"{reader.folder} was saved without random states (no_save_rng). Set no_load_rng: true to go on without."
        )
    engine.stream.state = states.pop("divided")
    restore(states)


def _adds_updates(reader: AnyReader, spec: ModelSpec) -> bool:
    """Whether the run puts low-rank updates beside weights that were saved without any."""
    return spec.lora is not None and reader.state.get("model_spec", {}).get("lora") is None


def _check_model(reader: AnyReader, spec: ModelSpec, weights_only: bool) -> None:
    saved = _readable(reader.state.get("model_spec", {}))
    mine = spec.to_dict()
    if saved.get("lora") is not None and mine["lora"] is None:
        raise CheckpointError(
            f"{reader.folder} has low-rank updates (LoRA), the config has none. Set the lora keys to those of that "
            "run, or merge the updates into the weights first: tools/ckpts/merge_lora.py."
        )
    if saved.get("lora") is None and mine["lora"] is not None and not weights_only:
        raise CheckpointError(
            f"{reader.folder} has no low-rank updates (LoRA), the config has lora_rank. Set finetune: true to start "
            "training updates of these weights."
        )
    if _adds_updates(reader, spec):
        mine["lora"] = None
    differing = [
        f"{name}: checkpoint {saved.get(name)!r}, config {mine.get(name)!r}"
        for name in sorted({*saved, *mine} - _FREE_FIELDS)
        if saved.get(name) != mine.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"{reader.folder} is of another model:\n  "
            + "\n  ".join(differing)
            + "\nUse the config it was trained with."
        )


def _readable(saved: dict[str, Any]) -> dict[str, Any]:
    """A manifest's fields with those that its writer did not have yet, at what their absence means."""
    try:
        return ModelSpec.from_dict(saved).to_dict()
    except TypeError:
        return saved


def _check_facts(reader: AnyReader, facts: dict[str, Any]) -> None:
    saved = reader.state.get("facts", {})
    differing = [
        f"{name}: then {saved[name]!r}, now {facts[name]!r}"
        for name in sorted(saved.keys() & facts.keys())
        if saved[name] != facts[name]
    ]
    if differing:
        raise CheckpointError(
            f"the run has changed since {reader.folder} was written, so its data order cannot be continued:\n  "
            + "\n  ".join(differing)
            + "\nPut it back as it was, or set finetune: true to take the weights and start a new run."
        )
