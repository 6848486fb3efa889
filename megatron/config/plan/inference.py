"""What generation and evaluation cost: weights, the cache of keys and values, one forward pass, its logits.

No gradients, no optimizer, no stages: tensor-parallel ranks divide the model, the other processes are replicas. Figures
are upper bounds where the length of prompts is not known: the longest that the model has positions for. Invariant: as
in `memory`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron.config.plan.architecture import BLOCK
from megatron.config.plan.job import Job, Layout, job_of, layout_of
from megatron.config.plan.memory import LOSS_CHUNK_ROWS, MARGIN, MARGIN_PART, RUNTIME, RUNTIME_BYTES
from megatron.config.resolved import Config

Purpose = Literal["generate", "evaluate"]
# Prompts that are continued together: megatron.inference.samples.Generator.batch_size.
GENERATED_TOGETHER = 8


@dataclass(frozen=True)
class InferenceEstimate:
    """Bytes by component on one rank. rows: sequences of a forward pass; positions: tokens of the longest of them.

    cache_if_asked: bytes of keys and values that only some tasks need (evaluation); not among the components.
    """

    components: dict[str, int]
    rows: int
    positions: int
    cache_if_asked: int = 0

    @property
    def tensors(self) -> int:
        """Bytes of live tensors."""
        return sum(size for name, size in self.components.items() if name not in (MARGIN, RUNTIME))

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.components.values())


def inference_layout(config: Config) -> Layout:
    """One process alone holds the whole model; several divide it, and what is left of them are replicas."""
    layout = layout_of(config)
    return replace(layout, stages=1, tp=1 if config.parallel.world_size == 1 else layout.tp, zero=1, accumulation=1)


def estimate_inference(config: Config, purpose: Purpose) -> InferenceEstimate:
    """The memory of a rank. Raises: ConfigError if the vocabulary's size is not known."""
    return inference_memory(_inference_job(config), config, purpose, inference_layout(config).tp)


def fitting_tensor_ranks(config: Config, purpose: Purpose, available: float) -> int | None:
    """The least model_parallel_size that the model divides by and that fits, or None."""
    model, job = config.model, _inference_job(config)
    for tp in range(1, model.num_attention_heads + 1):
        divides = not any(size % tp for size in (model.num_attention_heads, model.ffn_size, job.rows))
        shares = model.num_kv_heads % tp == 0 or tp % model.num_kv_heads == 0
        if divides and shares and inference_memory(job, config, purpose, tp).total <= available:
            return tp
    return None


def inference_memory(job: Job, config: Config, purpose: Purpose, tp: int) -> InferenceEstimate:
    """The memory of one of `tp` tensor-parallel ranks."""
    model, generation, word = job.model, config.generation, job.word
    layers = job.layers(tp)
    rows, prompt, positions = config.batch.train_micro_batch_size_per_gpu, job.sequence, job.sequence
    if purpose == "generate":
        rows = 1 if generation.text_gen_type == "interactive" else GENERATED_TOGETHER
        positions = model.max_position_embeddings
        if generation.text_gen_type == "unconditional":
            rows = min(rows, generation.num_samples)
            positions = min(positions, config.tuning.num_virtual_tokens + 1 + generation.maximum_tokens)
        # Without a cache the last pass is over everything; with it, the first is the longest.
        prompt = positions if generation.recompute else max(1, positions - generation.maximum_tokens)
    heads = max(model.num_kv_heads // tp, 1)
    cache = 2 * sum(x.kind == BLOCK for x in layers) * rows * heads * positions * model.head_dim * word
    local = job.head_rows(tp)
    if purpose == "generate":
        # As the head makes them, gathered, and in fp32 to choose from, which happens in the host's memory.
        logits = rows * (word * local + (word * job.rows if tp > 1 else 0) + 4 * job.rows)
        if job.device == "cpu" and (generation.temperature or generation.top_k or generation.top_p):
            logits += 4 * rows * 6 * job.rows
    else:
        logits = 4 * min(LOSS_CHUNK_ROWS[job.device], rows * prompt) * local * 2
        if job.device == "cpu" and word == 2:
            logits += 4 * local * model.hidden_size  # the head in fp32
    components: dict[str, int] = {
        "weights": sum(layer.numel_on_rank(tp) for layer in layers) * word,
        "keys and values": 0 if purpose == "evaluate" or generation.recompute else cache,
        "working memory": rows * prompt * word * _widest(job, tp),
    }
    # Once the blocks are through, their output and what is made of it.
    components["working memory"] = max(
        components["working memory"], 2 * rows * prompt * word * model.hidden_size + logits
    )
    components[MARGIN] = int(MARGIN_PART * sum(components.values()))
    components[RUNTIME] = RUNTIME_BYTES[job.device]
    return InferenceEstimate(components, rows, positions, cache if purpose == "evaluate" else 0)


def inference_values(config: Config, purpose: Purpose, memory_bytes: float | None) -> dict[str, Any]:
    """The memory as plain values, for scripts. Units: bytes, tokens."""
    estimate = estimate_inference(config, purpose)
    return {
        "components": estimate.components,
        "total": estimate.total,
        "rows": estimate.rows,
        "positions": estimate.positions,
        "cache_if_asked": estimate.cache_if_asked,
        "fits": None if memory_bytes is None else estimate.total <= memory_bytes,
    }


def _inference_job(config: Config) -> Job:
    job = job_of(config)
    # The CPU has no fast fp16: the weights are read as fp32.
    return replace(job, precision="fp32") if job.device == "cpu" and job.precision == "fp16" else job


def _widest(job: Job, tp: int) -> int:
    """Elements of one token that are alive at the fullest place of a block."""
    model = job.model
    hidden, heads, kv = model.hidden_size, model.num_attention_heads // tp, max(model.num_kv_heads // tp, 1)
    projected = (heads + 2 * kv) * model.head_dim
    turned = (heads + kv) * model.head_dim if model.pos_emb == "rotary" else 0
    attention = projected + turned + heads * model.head_dim
    feed_forward = (4 if model.is_gated else 2) * model.ffn_size // tp
    # Beside either: the block's input, which its caller holds, the stream after attention, what a norm made of it, and
    # what is added to it.
    return 4 * hidden + max(attention, feed_forward)
