"""YAML on disk, one frozen typed object in memory: `load(files, overrides) -> Config`. Never imports torch."""

from megatron.config.files import require_inputs
from megatron.config.loader import load
from megatron.config.resolved import Config, SourceFile

__all__ = ["Config", "SourceFile", "load", "require_inputs"]
