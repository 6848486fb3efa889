"""Counts of parameters: of the model, as DeepSpeed counts, of every pipeline stage.

Builds nothing. Invariant: a count is a sum over `job.layers_of`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.plan.architecture import Parameter
from megatron.config.plan.job import layers_of, require_vocabulary
from megatron.config.plan.stages import stage_layers
from megatron.config.resolved import Config

__all__ = ["Parameter", "ParameterCount", "count_parameters", "parameters", "require_vocabulary", "stage_parameters"]


@dataclass(frozen=True)
class ParameterCount:
    """Elements.

    unique: of the model itself, at any layout.
    counted: as DeepSpeed counts, those that tensor-parallel ranks replicate once for each.
    embedding: of the token and position tables and the output head.
    per_device: on the fullest rank (its stage, its tensor-parallel share).
    trained: of the unique ones, those that learn.
    """

    unique: int
    counted: int
    embedding: int
    per_device: int
    trained: int


def parameters(config: Config) -> Iterator[Parameter]:
    """All parameters, in the order of the layers. Raises: ConfigError if the vocabulary's size is not known."""
    for layer in layers_of(config):
        yield from layer.parameters


def count_parameters(config: Config) -> ParameterCount:
    """Count. Raises: ConfigError if the vocabulary's size is not known."""
    tp, unique, counted, embedding, trained = config.parallel.model_parallel_size, 0, 0, 0, 0
    for parameter in parameters(config):
        unique += parameter.numel
        counted += parameter.numel * (1 if parameter.sharded else tp)
        trained += parameter.numel if parameter.trained else 0
        if parameter.name.startswith(("embedding.", "head.")):
            embedding += parameter.numel
    return ParameterCount(unique, counted, embedding, max(stage_parameters(config)), trained)


def stage_parameters(config: Config) -> list[int]:
    """Elements on one rank of each pipeline stage. A tied head has a copy of the embedding if its stage is another."""
    found, tp = layers_of(config), config.parallel.model_parallel_size
    return [
        sum(layer.numel_on_rank(tp) for layer in stage)
        for stage in stage_layers(found, config.parallel.num_stages, config.parallel.pipe_partition_method, tp)
    ]
