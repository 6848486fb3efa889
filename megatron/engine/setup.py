"""From the run's configuration to the engine's options: the one file here that sees a `Config`."""

from __future__ import annotations

from typing import Any

from megatron.config import Config
from megatron.engine.options import EngineOptions
from megatron.parallel.topology import Topology

# Keys of the zero_optimization block that the options carry on their own, or that DeepSpeed is not to act on.
_OWN_ZERO_KEYS = frozenset({"stage", "elastic_checkpoint", "load_from_fp32_weights", "pipeline_loading_checkpoint"})
_OWN_EXTRA_ARGS = frozenset(
    {"activation_checkpointing", "checkpoint", "dataloader_drop_last", "seq_parallel_communication_data_type"}
)


def engine_options(config: Config) -> EngineOptions:
    """The options of a training run."""
    batch, precision = config.batch, config.precision
    zero: dict[str, Any] = {}
    if config.zero.zero_optimization is not None:
        zero = config.zero.zero_optimization.model_dump(exclude_defaults=True, exclude=set(_OWN_ZERO_KEYS))
        if zero.pop("cpu_offload_params", False):
            zero["cpu_offload_param"] = True
    return EngineOptions(
        micro_batch_size=batch.train_micro_batch_size_per_gpu,
        num_micro_batches=batch.gradient_accumulation_steps,
        precision=precision.precision,
        fp16=precision.fp16.model_dump(exclude_defaults=True, exclude={"type", "fp16"}) if precision.fp16 else {},
        bf16=precision.bf16.model_dump(exclude_defaults=True) if precision.bf16 else {},
        gradient_clipping=config.optimizer.gradient_clipping,
        zero_stage=config.zero.stage,
        zero=zero,
        loss_normalization=config.training.loss_normalization,
        partition_method=config.parallel.pipe_partition_method,
        attention_backend=config.model.attention_backend,
        extra=_pass_through(config),
    )


def _pass_through(config: Config) -> dict[str, Any]:
    """DeepSpeed's own blocks, as the user wrote them."""
    blocks = config.deepspeed.model_dump(exclude_defaults=True, exclude={"deepspeed", "deepspeed_extra_args"})
    if config.precision.fp32_allreduce:
        blocks.setdefault("communication_data_type", "fp32")
    extra = config.deepspeed.deepspeed_extra_args or {}
    return {**blocks, **{name: value for name, value in extra.items() if name not in _OWN_EXTRA_ARGS}}


def topology(config: Config) -> Topology:
    """The grid of ranks of a training run."""
    return Topology(
        pp_size=config.parallel.num_stages,
        dp_size=config.parallel.data_parallel_size,
        tp_size=config.parallel.model_parallel_size,
    )
