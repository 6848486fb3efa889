"""The finished configuration: frozen sections, where each value came from, and the files it was read from.

Knows no rule. Invariant: `Config.read(path)` after `config.write(path)` gives an equal object, so that every process
of a run sees the same values.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.common.errors import ConfigError
from megatron.common.files import atomic_write_text
from megatron.config.schema import (
    SECTION_OF,
    SECTIONS,
    BatchSection,
    CheckpointSection,
    DataSection,
    DeepSpeedSection,
    EvaluationSection,
    GenerationSection,
    LauncherSection,
    ModelSection,
    ObserveSection,
    OptimizerSection,
    ParallelSection,
    PrecisionSection,
    ScheduleSection,
    Section,
    TokenizerSection,
    TrainingSection,
    TuningSection,
    WidthSection,
    ZeroSection,
)
from megatron.config.schema.learning import decay_steps

FORMAT = 1


@dataclass(frozen=True)
class SourceFile:
    """One configuration file, verbatim."""

    path: str
    text: str


@dataclass(frozen=True)
class Config:
    """Everything a run is asked to do. Sections are frozen; their fields are upstream's keys.

    files: the files as they were, for checkpoints.
    origins: key -> "file:line", "command line" or "derived from ..."; absent for a default.
    warnings: what the user should know, each with its place.
    """

    parallel: ParallelSection
    batch: BatchSection
    model: ModelSection
    tokenizer: TokenizerSection
    precision: PrecisionSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    zero: ZeroSection
    training: TrainingSection
    tuning: TuningSection
    width: WidthSection
    data: DataSection
    checkpoint: CheckpointSection
    observe: ObserveSection
    generation: GenerationSection
    evaluation: EvaluationSection
    launcher: LauncherSection
    deepspeed: DeepSpeedSection
    files: tuple[SourceFile, ...] = ()
    origins: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def value(self, key: str) -> Any:
        """The value of one key. Raises: KeyError for a name that is no key."""
        return getattr(getattr(self, SECTION_OF[key]), key)

    def origin(self, key: str) -> str:
        """Where a key's value comes from: "file:line", "command line", "derived from ..." or "default"."""
        return self.origins.get(key, "default" if key in SECTION_OF else "not set")

    def to_upstream_dict(self) -> dict[str, Any]:
        """All keys with their resolved values, flat and JSON-ready, under upstream's names."""
        return {
            name: value for title in SECTIONS for name, value in getattr(self, title).model_dump(mode="json").items()
        }

    def write(self, path: str | Path) -> None:
        """Write the configuration as JSON, in one step."""
        content = {
            "format": FORMAT,
            "sections": {title: _write_section(getattr(self, title)) for title in SECTIONS},
            "files": [dataclasses.asdict(file) for file in self.files],
            "origins": self.origins,
            "warnings": list(self.warnings),
        }
        atomic_write_text(path, json.dumps(content, indent=1))

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """Read what `write` wrote. Raises: ConfigError if the file is missing or is not such a file."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            sections = {
                title: section.model_validate(content["sections"][title]) for title, section in SECTIONS.items()
            }
            assert content["format"] == FORMAT
            files = tuple(SourceFile(**file) for file in content["files"])
            origins, warnings = dict(content["origins"]), tuple(content["warnings"])
            return cls(**sections, files=files, origins=origins, warnings=warnings)  # type: ignore[arg-type]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: not a resolved configuration of this version ({error}). Give YAML files instead: train.py "
                "my.yml"
            ) from error

    def replace(self, **values: Any) -> Config:
        """A copy with some keys changed, unchecked."""
        changed: dict[str, dict[str, Any]] = {}
        for key, value in values.items():
            changed.setdefault(SECTION_OF[key], {})[key] = value
        sections = {title: getattr(self, title).model_copy(update=update) for title, update in changed.items()}
        return dataclasses.replace(self, **sections)  # type: ignore[arg-type]

    def with_train_iters(self, train_iters: int) -> Config:
        """A copy for a run of train_epochs, once the data has told how many steps that is.

        Raises: ConfigError if the data does not fill one batch.
        """
        epochs = f"train_epochs = {self.training.train_epochs}"
        if train_iters < 1:
            raise ConfigError(
                f"{self.origin('train_epochs')}: {epochs} over the training data does not fill one batch of "
                f"train_batch_size = {self.batch.train_batch_size} samples. Use more epochs or a smaller batch."
            )
        values = {"train_iters": train_iters}
        if self.schedule.lr_decay_iters is None:
            values["lr_decay_iters"] = decay_steps(train_iters, self.schedule.lr_decay_fraction)
        origins = {**self.origins, **dict.fromkeys(values, f"derived from {epochs}")}
        return dataclasses.replace(self.replace(**values), origins=origins)

    def require_training(self) -> None:
        """Refuse a configuration that lacks what training needs. Raises: ConfigError naming all that is missing."""
        place = " + ".join(file.path for file in self.files) or "configuration"
        missing = []
        if not self.training.train_iters and self.training.train_epochs is None:
            missing.append(f"{place}: train_iters is missing or 0. Set train_iters to the number of optimizer steps.")
        if self.optimizer.optimizer is None:
            missing.append(
                f"{place}: optimizer is missing. Add for example "
                "`optimizer: {type: Adam, params: {lr: 6.0e-4, betas: [0.9, 0.95]}}`."
            )
        if self.data.data_path is None and self.data.train_data_paths is None:
            missing.append(
                f"{place}: no training data. Set data_path, or train_data_paths with valid_ and test_data_paths."
            )
        if missing:
            raise ConfigError("\n".join(missing))


def _write_section(section: Section) -> dict[str, Any]:
    """JSON-ready values; of blocks only what was set, so that reading gives the same block."""
    return {
        name: value for name, value in section.model_dump(mode="json", exclude_unset=True).items() if value is not None
    }


def _read_section(title: str, values: dict[str, Any]) -> Section:
    kind = SECTIONS[title]
    typed = kind.model_validate(values)
    return kind.model_construct(**{name: getattr(typed, name) for name in kind.model_fields})
