"""The one way to a `Config`: read files, merge, check names and types, derive, check rules, freeze.

Opens nothing but the YAML files and, for its size, the tokenizer's. Invariant: either a complete `Config` comes back,
or one `ConfigError` that lists every problem found.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron.common.errors import ConfigError
from megatron.config.deepspeed_blocks import PLAIN_BLOCKS
from megatron.config.derive import DERIVATIONS
from megatron.config.draft import Draft, did_you_mean
from megatron.config.files import require_inputs
from megatron.config.former_keys import GONE
from megatron.config.layout import Machine, derive_batch, derive_launcher, derive_world
from megatron.config.merge import Merged
from megatron.config.messages import plain_message, show
from megatron.config.other_names import about_unknown_key
from megatron.config.resolved import Config, SourceFile
from megatron.config.rules import RULES
from megatron.config.schema import FIELDS, SECTION_OF, SECTIONS, field_extra
from megatron.config.source import Source, read_source
from megatron.config.upstream_keys import (
    MEANWHILE,
    NO_EFFECT,
    NOT_YET,
    NOT_YET_VALUES,
    REFUSED,
    SET_BY_PROGRAM,
)

INFERENCE: dict[str, Any] = {
    "pipe_parallel_size": 1,
    "train_batch_size": None,
    "gradient_accumulation_steps": None,
    "zero_optimization": None,
    "checkpoint_activations": None,
    "recompute_activations": "none",
    "no_load_optim": True,
}


def load(
    files: Iterable[str | Path] = (),
    overrides: Mapping[str, Any] | None = None,
    *,
    conf_dir: str | Path | None = None,
    devices: int | None = None,
    planning: bool = False,
    inference: bool = False,
    require_files: bool = False,
) -> Config:
    """Read and resolve a configuration.

    files: YAML or JSON files; `.yml` is appended where the suffix is missing. No key may stand in two of them.
    overrides: key -> value, over what the files say; dots reach into blocks (`optimizer.params.lr`).
    conf_dir: folder that the file names are relative to.
    devices: the number of processes, where the caller knows it.
    planning: accept a layout that is larger than this machine.
    inference: for generation and evaluation: one pipeline stage (checkpoints load at any layout), no optimizer
        states, no recomputation; the batch per step is not looked at.
    require_files: also require the tokenizer's file and the datasets to be there (raises DataError).

    Raises: ConfigError listing all problems.
    """
    paths = [find_file(name, conf_dir) for name in files]
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise ConfigError(f"{path}: is given {times} times. Name it once.")
    sources = [read_source(path) for path in paths]
    for source in sources:
        _refuse_other_kinds(source)
    merged = Merged(problems=[problem for source in sources for problem in source.problems])
    for source in sources:
        merged.add_source(source)
    merged.override(overrides or {})
    merged.move_out_of_extra_args()
    if inference:
        merged.override(INFERENCE, "generation and evaluation")
    draft = Draft({}, set(), merged.origins, [source.name for source in sources], inference)
    draft.problems, draft.warnings = merged.problems, merged.warnings
    _sort_names(draft, merged.values)
    _coerce(draft, merged.values)
    is_interactive = inference and merged.values.get("text_gen_type") == "interactive"
    _derive(draft, Machine(devices, planning, single_replica=is_interactive))
    for rule in RULES:
        draft.run(rule)
    if draft.problems:
        raise ConfigError("\n".join(_in_order(draft.problems, draft.files)))
    config = _freeze(draft, sources)
    if require_files:
        require_inputs(config)
    return config


def find_file(name: str | Path, conf_dir: str | Path | None = None) -> Path:
    """The path of a configuration file. Raises: ConfigError with near names, if it is not there."""
    path = Path(name)
    if path.suffix not in (".yml", ".yaml", ".json"):
        path = path.with_name(path.name + ".yml")
    if conf_dir is not None:
        path = Path(conf_dir) / path
    if path.is_file():
        return path
    folder = path.parent if path.parent.is_dir() else Path()
    names = [entry.name for entry in folder.iterdir() if entry.suffix in (".yml", ".yaml", ".json")]
    hint = did_you_mean(path.name, names)
    if not hint and conf_dir is None and (Path("configs") / path).is_file():
        hint = f" Did you mean {Path('configs') / path}?"
    raise ConfigError(f"{path}: there is no such configuration file (looked from {Path.cwd()}).{hint}")


def _refuse_other_kinds(source: Source) -> None:
    """Raises: ConfigError for the configuration of another program, instead of a message for each of its keys."""
    if "model_type" in source.values and {"architectures", "transformers_version"} & set(source.values):
        raise ConfigError(
            f"{source.name}: is the configuration of a Hugging Face model. `python tools/ckpts/convert_hf_to_neox.py` "
            "makes a checkpoint of the model and the configuration that belongs to it."
        )


def _sort_names(draft: Draft, values: dict[str, Any]) -> None:
    """Take out of `values` what is no key of the schema, and say what becomes of it."""
    idle: dict[str, list[str]] = {}
    for name in list(values):
        value = values[name]
        hint = field_extra(name, "derived") if name in FIELDS else SET_BY_PROGRAM.get(name)
        if hint is not None:
            del values[name]
            instead = f" Set {hint} instead." if hint else " Remove it."
            draft.problem(name, f"{name} is worked out by the program and cannot be set.{instead}")
        elif name in NO_EFFECT:
            del values[name]
            neutral, reason = NO_EFFECT[name]
            if not _is_neutral(value, neutral if isinstance(neutral, tuple) else (neutral,)):
                idle.setdefault(reason, []).append(f"{name} ({draft.place(name)})")
                draft.idle.add(name)
        elif name in REFUSED:
            del values[name]
            neutral_values, reason = REFUSED[name]
            if not _is_neutral(value, neutral_values):
                draft.problem(name, f"{name} = {show(value)}: {reason}.")
        elif name in NOT_YET:
            del values[name]
            neutral_values, feature = NOT_YET[name]
            if not _is_neutral(value, neutral_values):
                advice = MEANWHILE.get(feature, "Remove the key.")
                draft.problem(name, f"{name} = {show(value)} belongs to {feature}, not supported yet. {advice}")
        elif name in GONE:
            del values[name]
            draft.problem(name, f"{name} is no key of this version: {GONE[name]}.")
        elif name not in FIELDS:
            del values[name]
            advice, meant = about_unknown_key(name, value)
            draft.meant.update(meant)
            draft.problem(name, f"unknown key {name}.{advice}")
    for reason, names in idle.items():
        draft.warnings.append(f"{', '.join(names)}: no effect here, {reason}")


def _is_neutral(value: Any, neutral_values: tuple[Any, ...]) -> bool:
    return value is None or value in neutral_values or (isinstance(value, dict) and value.get("enabled") is False)


def _coerce(draft: Draft, values: dict[str, Any]) -> None:
    """Bring every value to its declared type, one section at a time; null means unset."""
    set_values = {name: _without_null(name, value) for name, value in values.items() if not _is_unset(name, value)}
    for section in SECTIONS.values():
        mine = {name: value for name, value in set_values.items() if name in section.model_fields}
        try:
            typed = section.model_validate(mine)
        except ValidationError as error:
            for item in error.errors():
                dotted = ".".join(
                    str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-"))
                )
                draft.problem(dotted, plain_message(dotted, item, section))
                draft.failed.add(str(item["loc"][0]))
            typed = section.model_validate({name: value for name, value in mine.items() if name not in draft.failed})
        draft.values.update({name: getattr(typed, name) for name in section.model_fields})
        draft.given.update(mine)


def _is_unset(name: str, value: Any) -> bool:
    """Upstream's files write `"load": ""` for nothing, too."""
    return value is None or (value == "" and FIELDS[name].default is None)


def _without_null(name: str, value: Any) -> Any:
    """A typed block without its nulls: they mean unset there too."""
    if not isinstance(value, dict) or name in (*PLAIN_BLOCKS, "comet_others", "deepspeed_extra_args"):
        return value
    return {inner: _without_null(inner, part) for inner, part in value.items() if part is not None}


def _in_order(problems: list[str], files: list[str]) -> list[str]:
    """Problems as a reader of the files meets them; those without a line stand last."""

    def place(text: str) -> tuple[int, int]:
        for index, file in enumerate(files):
            if match := re.match(re.escape(file) + r":([0-9]+): ", text):
                return index, int(match[1])
        return len(files), 0

    return sorted(dict.fromkeys(problems), key=place)


def _derive(draft: Draft, machine: Machine) -> None:
    world = ("world_size", "data_parallel_size")
    draft.run(lambda draft: derive_launcher(draft, machine), ("launcher",))
    draft.run(lambda draft: derive_world(draft, machine), world)
    draft.run(derive_batch, ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"))
    for derivation, outputs in DERIVATIONS:
        draft.run(derivation, outputs)
    for name, (working, advice) in NOT_YET_VALUES.items():
        if name not in draft.failed and draft[name] not in working:
            place = "optimizer.type" if name == "optimizer_type" else name
            shown = str(draft[name]).lower() if isinstance(draft[name], bool) else draft[name]
            draft.problem(place, f"{place} = {shown} is not supported yet. {advice}")


def _freeze(draft: Draft, sources: list[Source]) -> Config:
    sections = {
        title: section.model_construct(**{name: draft[name] for name in section.model_fields})
        for title, section in SECTIONS.items()
    }
    files = tuple(SourceFile(source.name, source.text) for source in sources)
    origins = {name: place for name, place in draft.origins.items() if name.split(".")[0] in SECTION_OF}
    return Config(**sections, files=files, origins=origins, warnings=tuple(draft.warnings))  # type: ignore[arg-type]
