"""What the engine needs to know, as plain values, and DeepSpeed's dictionary made from it.

Not here: reading a YAML (megatron.engine.setup). Invariant: the dictionary never makes DeepSpeed compile an extension.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from megatron.parallel.process_groups import ProcessGroups

Precision = Literal["fp32", "fp16", "bfloat16"]
LossNormalization = Literal["micro_batch", "tokens"]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}

# No stage below 1: DeepSpeed's stage 0 clips by a wrong norm under pipelining and never scales the fp16 loss.
LEAST_ZERO_STAGE = 1


@dataclass(frozen=True)
class EngineOptions:
    """Batch sizes per rank, precision, clipping, ZeRO and the pass-through blocks.

    Units: reduce_bucket_size in elements. `zero` holds the user's further zero_optimization entries.
    """

    micro_batch_size: int
    num_micro_batches: int
    precision: Precision = "fp32"
    fp16: Mapping[str, Any] = field(default_factory=dict)
    bf16: Mapping[str, Any] = field(default_factory=dict)
    gradient_clipping: float = 1.0
    zero_stage: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict)
    loss_normalization: LossNormalization = "micro_batch"
    partition_method: str = "parameters"
    attention_backend: str = "auto"
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return DTYPES[self.precision]


def deepspeed_config(options: EngineOptions, groups: ProcessGroups, num_parameters: int) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary for these options.

    num_parameters: elements on this rank, to keep communication buckets no larger than what they carry.
    """
    stage = max(LEAST_ZERO_STAGE, options.zero_stage)
    # DeepSpeed allocates whole buckets; its default of 5e8 elements would be most of a small machine's memory.
    zero = {"contiguous_gradients": False, "overlap_comm": False, **options.zero, "stage": stage}
    for name in ("reduce_bucket_size", "allgather_bucket_size"):
        # Rounded up to an even number: DeepSpeed aligns what it gathers to two elements.
        zero[name] = (max(1, min(int(zero.get(name, 500_000_000)), num_parameters)) + 1) // 2 * 2
    config: dict[str, Any] = {
        "train_batch_size": options.micro_batch_size * options.num_micro_batches * groups.dp_size,
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.num_micro_batches,
        "gradient_clipping": options.gradient_clipping,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # With offload DeepSpeed insists on an optimizer that it compiles; torch's fused AdamW runs on the CPU as well.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        **options.extra,
    }
    if groups.sequence_parallel:
        # DeepSpeed would send each tensor-parallel rank's part of "the same" activation: here they are different ones.
        config["pipeline"] = {**config.get("pipeline", {}), "pipe_partitioned": False, "grad_partitioned": False}
    if options.precision == "bfloat16":
        # The default accumulates gradients in bf16, which loses small micro-batch contributions.
        # The step guard looks at the norm; DeepSpeed's own check would pass over all gradients once more.
        config["bf16"] = {"check_grad_overflow": False, **options.bf16, "enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    elif options.precision == "fp16":
        config["fp16"] = {**options.fp16, "enabled": True}
    return config
