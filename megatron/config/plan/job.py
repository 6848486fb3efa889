"""What a plan is made for: the job (what the layout does not change) and the layout (what a search may change).

Invariant: neither knows where its values come from; a configuration gives both, a search makes layouts of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron.common.errors import ConfigError
from megatron.config.plan.architecture import Layer, architecture, head_outputs
from megatron.config.plan.stages import stage_layers
from megatron.config.plan.tuning import tuned
from megatron.config.resolved import Config
from megatron.config.schema import ModelSection
from megatron.config.schema.tuning import TuningSection

Recompute = Literal["none", "selective", "full"]
# fp32 words per parameter: Adam keeps two moments, Lion one, SGD one with momentum.
STATE_WORDS = {"adam": 2, "lion": 1, "sgd": 1, "madgrad_wd": 3}
# DeepSpeed's own values of ZeRO 3, in elements.
PERSISTENCE, LIVE_PARAMETERS, PREFETCH = 100_000, 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Layout:
    """How the work is divided. group: blocks recomputed together, with full recomputation."""

    stages: int
    tp: int
    dp: int
    zero: int
    micro_batch: int
    accumulation: int
    recompute: Recompute = "none"
    group: int = 1
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Processes."""
        return self.stages * self.tp * self.dp

    @property
    def global_batch(self) -> int:
        """Sequences of a step."""
        return self.dp * self.micro_batch * self.accumulation


@dataclass
class Job:
    """A model and how it learns. Units: bucket, persistence, live_parameters in elements.

    model: its seq_length is what the blocks see, the virtual tokens of a soft prompt included.
    accumulates_apart: gradients add up in a buffer of their own (DeepSpeed's BF16 optimizer, ZeRO 1).
    """

    model: ModelSection
    tuning: TuningSection
    rows: int
    precision: str
    optimizer_words: int
    offloads: bool
    accumulation_word: int
    bucket: int
    partition_method: str
    device: str
    persistence: int = PERSISTENCE
    live_parameters: int = LIVE_PARAMETERS + PREFETCH
    sizes: dict[Any, Any] = field(default_factory=dict)
    _layers: dict[tuple[int, bool], tuple[Layer, ...]] = field(default_factory=dict)

    @property
    def word(self) -> int:
        """Bytes of a weight or an activation."""
        return 4 if self.precision == "fp32" else 2

    @property
    def sequence(self) -> int:
        """Tokens of a sequence, virtual ones included."""
        length: int = self.model.seq_length
        return length

    @property
    def accumulates_apart(self) -> bool:
        """Whether gradients add up in an fp32 buffer beside those that autograd makes."""
        return self.precision == "bfloat16" and self.accumulation_word == 4

    def layers(self, tp: int, *, staged: bool = False) -> tuple[Layer, ...]:
        """The layers, as `tp` tensor-parallel ranks divide them. staged: pipeline stages ask for all gradients."""
        key = (tp, staged)
        if key not in self._layers:
            layers = architecture(self.model, self.rows, tp)
            self._layers[key] = tuned(layers, self.model, self.tuning, staged=staged)
        return self._layers[key]

    def trains_head(self, tp: int) -> bool:
        """Whether the output head learns, its own matrix or the embedding's."""
        layers = self.layers(tp)
        return (layers[0] if layers[-1].ties else layers[-1]).parameters[0].trained

    def head_rows(self, tp: int) -> int:
        """Outputs of the head on one tensor-parallel rank: its part of the vocabulary, or all labels."""
        return self.rows // tp if self.model.task == "causal_lm" else head_outputs(self.model, self.rows)

    def stages(self, num_stages: int, tp: int) -> list[list[Layer]]:
        """The layers of every stage."""
        return stage_layers(self.layers(tp, staged=num_stages > 1), num_stages, self.partition_method, tp)


def require_vocabulary(config: Config) -> None:
    """Raises: ConfigError if the rows of the embedding are not known, because the tokenizer's file is missing."""
    if config.tokenizer.padded_vocab_size is None:
        raise ConfigError(
            f"{config.origin('vocab_file')}: the size of the vocabulary is not known: {config.tokenizer.vocab_file} "
            "is not "
            "there. Make the tokenizer first (prepare_data.py does), or set padded_vocab_size."
        )


def layers_of(config: Config) -> tuple[Layer, ...]:
    """All layers in order; a tied head stands last, without parameters of its own.

    Raises: ConfigError if the vocabulary's size is not known.
    """
    return job_of(config).layers(config.parallel.model_parallel_size)


def job_of(config: Config) -> Job:
    """The job of a configuration. Raises: ConfigError if the vocabulary's size is not known."""
    require_vocabulary(config)
    block, optimizer = config.zero.zero_optimization, config.optimizer
    given = block.model_dump(exclude_none=True) if block is not None else {}
    device = "cuda" if config.launcher.device == "cuda" else "cpu"
    words = STATE_WORDS.get(optimizer.optimizer_type, 2)
    if optimizer.optimizer_type == "sgd" and optimizer.momentum == 0:
        words = 0
    moved = given.get("cpu_offload") or given.get("offload_optimizer", {}).get("device", "none") != "none"
    precision = config.precision.precision
    accumulated = (config.deepspeed.data_types or {}).get("grad_accum_dtype")
    wide = precision != "fp16" if accumulated is None else accumulated in ("fp32", "float32")
    virtual = config.tuning.num_virtual_tokens
    return Job(
        model=config.model.model_copy(update={"seq_length": config.model.seq_length + virtual}),
        tuning=config.tuning,
        rows=config.tokenizer.padded_vocab_size,
        precision=precision,
        optimizer_words=words,
        # On a CPU, the host's memory is the device's.
        offloads=bool(moved) and device == "cuda",
        accumulation_word=4 if wide or precision == "fp32" else 2,
        bucket=int(given.get("reduce_bucket_size", 500_000_000)),
        partition_method=config.parallel.pipe_partition_method,
        device=device,
        persistence=int(given.get("stage3_param_persistence_threshold", PERSISTENCE)),
        # What is soon used again stays, and what comes next is fetched ahead.
        live_parameters=int(
            min(
                given.get("stage3_max_live_parameters", LIVE_PARAMETERS),
                given.get("stage3_max_reuse_distance", LIVE_PARAMETERS),
            )
            + given.get("stage3_prefetch_bucket_size", PREFETCH)
        ),
    )


def layout_of(config: Config) -> Layout:
    """The layout of a configuration."""
    return Layout(
        stages=config.parallel.num_stages,
        tp=config.parallel.model_parallel_size,
        dp=config.parallel.data_parallel_size or 1,
        zero=config.zero.stage,
        micro_batch=config.batch.train_micro_batch_size_per_gpu,
        accumulation=config.batch.gradient_accumulation_steps,
        recompute=config.training.recompute,
        group=config.training.checkpoint_num_layers,
        sequence_parallel=config.parallel.sequence_parallel,
    )
