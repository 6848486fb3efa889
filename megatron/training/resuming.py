"""How a run continues from a checkpoint: what is taken, what is refused, and what is said.

Not here: writing one (megatron.training.saving). Invariant: whatever differs between the run that saved and the run
that continues is either refused or said, never passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from megatron.checkpoint import Location
from megatron.checkpoint.random_state import restore
from megatron.common.errors import CheckpointError
from megatron.convert.foreign import AnyReader, ForeignReader
from megatron.convert.neox_layers import GroupedLayout
from megatron.convert.open import foreign_folder, open_weights
from megatron.engine.state import import_optimizer, import_weights
from megatron.engine.train_engine import TrainEngine
from megatron.model.spec import ModelSpec
from megatron.model.width_scaling import by_width_keys
from megatron.optim.schedule import LearningRateSchedule
from megatron.training.additions import agreed_fields, is_kept, source_of, start_of_prompt
from megatron.training.forward_check import check_forward
from megatron.training.saving import Position, share

Report = Callable[[str], None]

# Fields that change what is regularised or how weights start, but not which function the weights mean.
_FREE_FIELDS = frozenset(
    {
        "padded_vocab_size",
        "attention_dropout",
        "hidden_dropout",
        "init_method",
        "output_init_method",
        "init_std",
        "init_scale",
    }
)
# Names of one optimizer: their states are the same.
_OPTIMIZER_FAMILIES = {"adamw": "adam", "cpu_adam": "adam", "cpu_torch_adam": "adam"}
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class LoadOptions:
    """Where to continue from, and which parts to take.

    grouped: as in `open_neox`. allow_changed_data: other training data is told instead of refused.
    checks_forward: run the pass that the checkpoint stored the result of (see megatron.training.forward_check).
    """

    folder: Location | None
    step: int | None = None
    allow_fresh_start: bool = False
    allow_changed_data: bool = False
    weights_only: bool = False
    grouped: GroupedLayout | None = None
    with_optimizer: bool = True
    with_rng: bool = True
    checks_forward: bool = False


def load_run(engine: TrainEngine, options: LoadOptions, facts: dict[str, Any], report: Report) -> Position:
    """Continue from the newest whole checkpoint in the folder. Collective.

    Returns the position to go on from (zero with `weights_only`, which takes nothing but the weights).
    Raises: CheckpointError if there is none and a fresh start was not allowed, or if it is of another model or of
    other data.
    """
    reader = open_run(engine, options, report)
    return Position() if reader is None else restore_run(engine, reader, options, facts, report)


def open_run(engine: TrainEngine, options: LoadOptions, report: Report) -> AnyReader | None:
    """The newest whole checkpoint in the folder; None where there is none and need not be. Collective.

    Raises: as `load_run`.
    """
    if options.folder is None:
        return None
    if options.allow_fresh_start and not _has_any(options.folder):
        report(f"no checkpoint in {options.folder} yet: starting from step 0 (allow_fresh_start)")
        return None
    reader = open_weights(
        options.folder,
        engine.spec.base,
        options.step,
        grouped=options.grouped,
        may_lack_head=True,
        part=engine.groups.global_rank,
        parts=engine.groups.topology.world_size,
        share=share,
        report=report,
    )
    if isinstance(reader, ForeignReader) and not options.weights_only:
        raise CheckpointError(
            f"{reader.folder} is a {reader.what}: its weights can be taken, its optimizer state and position cannot. "
            "Set finetune: true to start a new run from these weights."
        )
    _check_model(reader, engine.spec, options.weights_only)
    return reader


def restore_run(
    engine: TrainEngine, reader: AnyReader, options: LoadOptions, facts: dict[str, Any], report: Report
) -> Position:
    """Take from an opened checkpoint what the options ask for. Collective. Returns and raises as `load_run`."""
    if not options.weights_only:
        _check_facts(reader, facts, report if options.allow_changed_data else None)
        if options.with_optimizer:
            _check_optimizer(reader, facts)
    spec = engine.spec
    import_weights(engine, source_of(reader, spec), keeps=lambda name: is_kept(reader, spec, name))
    if options.checks_forward:
        check_forward(engine, reader, report)
    if options.weights_only:
        report(f"weights from {reader.folder}; step, optimizer, schedule and data start anew (finetune)")
        if spec.soft_prompt is not None:
            report(f"soft prompt of {spec.num_virtual_tokens} tokens: {start_of_prompt(reader, spec)}")
        return Position()
    known = {field.name for field in fields(Position)}
    position = Position(**{name: value for name, value in reader.state["position"].items() if name in known})
    if options.with_optimizer:
        import_optimizer(engine, reader, reader.state["optimizer_steps"])
        engine.restore_loss_scale(reader.state["loss_scale"])
    else:
        report(f"optimizer states start anew at step {position.step} (no_load_optim)")
    if options.with_rng:
        _restore_rng(engine, reader, position.step, report)
    else:
        engine.reseed(position.step)
        report("random states (dropout) start anew (no_load_rng)")
    report(
        f"continuing from {reader.folder}: step {position.step}, {position.consumed_samples:,} samples, "
        f"{position.consumed_tokens:,} tokens, {position.anomalies.get('num_skipped', 0)} skipped steps, "
        f"{position.elapsed_s:.0f} s of training so far"
    )
    return position


ScheduleSource = Literal["checkpoint", "config"]


def resumed_schedule(
    reader: AnyReader, mine: LearningRateSchedule, source: ScheduleSource | None, report: Report
) -> LearningRateSchedule:
    """The schedule of a run that goes on from a checkpoint: the configuration's (`mine`) or the checkpoint's.

    source: which of them, where they differ (use_checkpoint_lr_scheduler, override_lr_scheduler). None: the
    configuration's, with a warning. Either way the step goes on from the checkpoint's, and the difference is said.
    Raises: CheckpointError if the checkpoint's is asked for and it holds none.
    """
    saved = reader.state.get("schedule")
    if saved is None:
        if source == "checkpoint":
            raise CheckpointError(
                f"{reader.folder} holds no learning-rate schedule. Remove use_checkpoint_lr_scheduler to use the "
                "configuration's."
            )
        return mine
    theirs = LearningRateSchedule(**saved)
    if theirs == mine:
        return mine
    keys = {"style": "lr_decay_style", "decay_iters": "lr_decay_iters"}
    differing = ", ".join(
        f"{keys.get(name, name)} {value} in the checkpoint, {asdict(mine)[name]} in the configuration"
        for name, value in asdict(theirs).items()
        if value != asdict(mine)[name]
    )
    rates = f"at step {reader.step} the rate is {theirs.lr_at(reader.step):.4g} and {mine.lr_at(reader.step):.4g}"
    what = f"learning-rate schedules differ: {differing}; {rates}."
    if source == "checkpoint":
        report(f"{what} The checkpoint's goes on (use_checkpoint_lr_scheduler)")
        return theirs
    if source == "config":
        report(f"{what} The configuration's takes over (override_lr_scheduler)")
        return mine
    report(
        f"warning: {what} The configuration's takes over; use_checkpoint_lr_scheduler: true would keep the "
        "checkpoint's, override_lr_scheduler: true says that this is meant"
    )
    return mine


def changed_settings(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """`key: then, now` for every key of both whose value has changed; blocks are looked into."""
    lines = []
    for name in sorted(saved.keys() & mine.keys()):
        then, now = saved[name], mine[name]
        if isinstance(then, dict) and isinstance(now, dict):
            everything = {**dict.fromkeys({*then, *now})}
            inner = changed_settings({**everything, **then}, {**everything, **now})
            lines += [f"{name}.{line}" for line in inner]
        elif then != now:
            lines.append(f"{name}: {_brief(then)} then, {_brief(now)} now")
    return lines


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "..."


def _has_any(folder: Location) -> bool:
    if foreign_folder(folder) is not None:
        return True
    return folder.is_dir() and any(path.name.startswith("global_step") for path in folder.iterdir())


def _restore_rng(engine: TrainEngine, reader: AnyReader, step: int, report: Report) -> None:
    topology, saved = engine.groups.topology, reader.state["layout"]
    if (saved["tp"], saved["pp"], saved["dp"]) != (topology.tp_size, topology.pp_size, topology.dp_size):
        engine.reseed(step)
        report("the layout has changed: random states (dropout) start anew, data order and weights go on exactly")
        return
    states = reader.rank_tensors(engine.groups.global_rank)
    if not states:
        raise CheckpointError(
            f"{reader.folder} was saved without random states (no_save_rng). Set no_load_rng: true to go on without."
        )
    engine.stream.state = states.pop("divided")
    restore(states)


def _check_model(reader: AnyReader, spec: ModelSpec, weights_only: bool) -> None:
    saved = _readable(reader.state.get("model_spec", {}))
    mine = agreed_fields(reader, saved, spec.to_dict(), weights_only)
    theirs, ours = by_width_keys(saved, mine)
    differing = [
        f"{name}: checkpoint {theirs.get(name)!r}, config {ours.get(name)!r}"
        for name in sorted({*theirs, *ours} - _FREE_FIELDS)
        if theirs.get(name) != ours.get(name)
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


def _check_facts(reader: AnyReader, facts: dict[str, Any], tell_changed_data: Report | None) -> None:
    """Refuse what has changed; other training data is told instead where `tell_changed_data` is given."""
    saved = reader.state.get("facts", {})
    differing = [
        f"{name}: then {saved[name]!r}, now {facts[name]!r}"
        for name in sorted(saved.keys() & facts.keys() - {OPTIMIZER, TRAIN_DATA})
        if saved[name] != facts[name]
    ]
    data = _changed_data(saved.get(TRAIN_DATA), facts.get(TRAIN_DATA))
    if data and tell_changed_data is not None:
        tell_changed_data(
            f"warning: the {data}. The run goes on in the new order, behind as many samples as were read in the old "
            "one (allow_changed_data): some may come again, others not at all"
        )
        data = ""
    if differing or data:
        way = ", or allow_changed_data: true to go on with this data" if not differing else ""
        raise CheckpointError(
            f"the run has changed since {reader.folder} was written, so its data order cannot be continued:\n  "
            + "\n  ".join([*filter(None, [data]), *differing])
            + f"\nPut it back as it was, or set finetune: true to take the weights and start a new run{way}."
        )


# What a name in a data set's parts has to do with the configuration.
_REASONS = {
    "epochs": "as many as train_iters needs; all of them are shuffled as one",
    "documents of all epochs": "as many as train_iters needs; all of them are shuffled as one",
    "documents": "split",
    "tokens": "the content of the data files",
    "labels": "the content of the label files",
}


def _changed_data(then: Any, now: Any) -> str:
    """In words how the training data has changed; empty if its order is the same."""
    if not (isinstance(then, dict) and isinstance(now, dict)) or then["fingerprint"] == now["fingerprint"]:
        return ""
    lines = changed_settings(
        *({name: value for name, value in parts.items() if name != "fingerprint"} for parts in (then, now))
    )
    named = []
    for line in lines:
        reason = _REASONS.get(line.split(": ")[0].rsplit(".", 1)[-1])
        named.append(f"{line} ({reason})" if reason else line)
    added = sorted(then.keys() ^ now.keys())
    named += [f"{name}: only {'then' if name in then else 'now'}" for name in added]
    return "train data has changed: " + "; ".join(named or ["its fingerprint"])


TRAIN_DATA = "train data"
OPTIMIZER = "optimizer"


def _check_optimizer(reader: AnyReader, facts: dict[str, Any]) -> None:
    then, now = (
        _OPTIMIZER_FAMILIES.get(name, name)
        for name in (values.get(OPTIMIZER, "") for values in (reader.state.get("facts", {}), facts))
    )
    if then and now and then != now:
        raise CheckpointError(
            f"{reader.folder} was trained with the optimizer {then}, the configuration says {now}: the states of one "
            "mean nothing to the other. Go on with the same optimizer, or set no_load_optim: true to start it anew "
            "from the same weights and step."
        )
