"""Every configuration key, grouped into frozen sections."""

from __future__ import annotations

from pydantic.fields import FieldInfo

from megatron.config.schema.architecture import GATED_ACTIVATIONS, ModelSection, RopeScalingBlock
from megatron.config.schema.base import Block, Section
from megatron.config.schema.execution import (
    BatchSection,
    DeepSpeedSection,
    LauncherSection,
    ParallelSection,
    PrecisionSection,
    ZeroSection,
)
from megatron.config.schema.inputs import DataSection, TokenizerSection
from megatron.config.schema.learning import OptimizerSection, ScheduleSection, TrainingSection
from megatron.config.schema.outputs import CheckpointSection, EvaluationSection, GenerationSection, ObserveSection
from megatron.config.schema.tuning import TuningSection
from megatron.config.schema.width import BaseShapes, WidthSection

SECTIONS: dict[str, type[Section]] = {
    "parallel": ParallelSection,
    "batch": BatchSection,
    "model": ModelSection,
    "tokenizer": TokenizerSection,
    "precision": PrecisionSection,
    "optimizer": OptimizerSection,
    "schedule": ScheduleSection,
    "zero": ZeroSection,
    "training": TrainingSection,
    "tuning": TuningSection,
    "width": WidthSection,
    "data": DataSection,
    "checkpoint": CheckpointSection,
    "observe": ObserveSection,
    "generation": GenerationSection,
    "evaluation": EvaluationSection,
    "launcher": LauncherSection,
    "deepspeed": DeepSpeedSection,
}
FIELDS: dict[str, FieldInfo] = {
    name: field for section in SECTIONS.values() for name, field in section.model_fields.items()
}
SECTION_OF: dict[str, str] = {name: title for title, section in SECTIONS.items() for name in section.model_fields}


def field_extra(name: str, what: str) -> str | None:
    """What a key's line says about `unit`, `deepspeed`, `ours` or `derived`; None where it says nothing."""
    extra = FIELDS[name].json_schema_extra
    value = extra.get(what) if isinstance(extra, dict) else None
    return None if value is None else str(value)


__all__ = [
    "FIELDS",
    "GATED_ACTIVATIONS",
    "SECTIONS",
    "SECTION_OF",
    "BaseShapes",
    "BatchSection",
    "Block",
    "CheckpointSection",
    "DataSection",
    "DeepSpeedSection",
    "EvaluationSection",
    "GenerationSection",
    "LauncherSection",
    "ModelSection",
    "ObserveSection",
    "OptimizerSection",
    "ParallelSection",
    "PrecisionSection",
    "RopeScalingBlock",
    "ScheduleSection",
    "Section",
    "TokenizerSection",
    "TrainingSection",
    "TuningSection",
    "WidthSection",
    "ZeroSection",
    "field_extra",
]
