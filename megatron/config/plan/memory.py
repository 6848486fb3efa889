"""Memory of the fullest device, by component: an estimate from shapes, before anything is allocated.

Not a promise: allocators round up and kernels need scratch space, which `margin` stands for. Invariant: each component
is a formula over the configuration, written beside its line.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.plan.parameters import stage_parameters
from megatron.config.resolved import Config

LOSS_CHUNK_ROWS = 512
# Of fp32 words per parameter: Adam keeps two moments, Lion one, SGD one with momentum.
STATE_WORDS = {"adam": 2, "lion": 1, "sgd": 1, "madgrad_wd": 3}
RUNTIME_BYTES = {"cuda": 1_000_000_000, "cpu": 400_000_000}
MARGIN_PART = 0.05


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by component on the fullest device. stage: the pipeline stage it belongs to."""

    components: dict[str, int]
    stage: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.components.values())


def estimate_memory(config: Config) -> MemoryEstimate:
    """Estimate each stage and take the fullest. Raises: ConfigError if the vocabulary's size is not known."""
    estimates = [
        MemoryEstimate(_stage_memory(config, stage, numel), stage)
        for stage, numel in enumerate(stage_parameters(config))
    ]
    return max(estimates, key=lambda estimate: estimate.total)


def _stage_memory(config: Config, stage: int, numel: int) -> dict[str, int]:
    zero, dp = config.zero, config.parallel.data_parallel_size or 1
    half = config.precision.precision != "fp32"
    block = zero.zero_optimization
    offloaded = block is not None and (
        block.cpu_offload or (block.offload_optimizer or block).model_dump().get("device") in ("cpu", "nvme")
    )
    words = STATE_WORDS[config.optimizer.optimizer_type]
    if config.optimizer.optimizer_type == "sgd" and config.optimizer.momentum == 0:
        words = 0
    # bfloat16 gradients accumulate in fp32; fp16 ones stay fp16 behind the loss scale.
    gradient_bytes = 2 if config.precision.precision == "fp16" else 4
    bucket = min(block.reduce_bucket_size if block is not None else numel, numel) * gradient_bytes
    components = {
        "weights": numel * (2 if half else 4) // (dp if zero.stage == 3 else 1),
        "gradients": numel * gradient_bytes // (dp if zero.stage >= 2 else 1),
        "fp32 master weights": 0 if offloaded else 4 * numel // dp,
        "optimizer states": 0 if offloaded else 4 * words * numel // dp,
        "activations": _activation_bytes(config, stage, 2 if half else 4),
        "loss buffer": _loss_bytes(config) if stage == config.parallel.num_stages - 1 else 0,
        "communication buckets": bucket if dp > 1 else 0,
        "runtime": RUNTIME_BYTES["cuda" if config.launcher.device == "cuda" else "cpu"],
    }
    components["margin"] = int(MARGIN_PART * sum(components.values()))
    return components


def _activation_bytes(config: Config, stage: int, word: int) -> int:
    """What the backward pass needs of the forward pass, for all micro-batches that are under way on this stage."""
    model, stages, tp = config.model, config.parallel.num_stages, config.parallel.model_parallel_size
    batch, sequence = config.batch.train_micro_batch_size_per_gpu, model.seq_length
    hidden, heads, kv_heads, ffn = model.hidden_size, model.num_attention_heads, model.num_kv_heads, model.ffn_size
    # A rank has its part of the query heads, and of the kv heads at least one, which it may share with others.
    width, kv_width = heads // tp * model.head_dim, max(1, kv_heads // tp) * model.head_dim
    # Whole on every tensor rank: the block's input, what the two norms make of it, a sequential residual's middle.
    whole = hidden * (3 + (0 if model.gpt_j_residual else 1))
    # Divided: q, k, v; rotated q and k; the attention's output; the feed-forward before and after its activation.
    # Of these, selective recomputation makes the first five again.
    heads_in = width + 2 * kv_width + (width + kv_width if model.pos_emb == "rotary" else 0)
    divided = heads_in + width + ffn // tp * (3 if model.is_gated else 2)
    if config.parallel.sequence_parallel:
        whole, hidden = whole // tp, hidden // tp
    tokens = batch * sequence
    kept_input, block, attention = (tokens * size * word for size in (hidden, whole + divided, heads_in))
    layers = -(-model.num_layers // stages)
    # One stage holds as many micro-batches as there are stages from it to the last (1F1B schedule).
    under_way = min(config.batch.gradient_accumulation_steps, stages - stage)
    if config.training.recompute == "full":
        group = min(config.training.checkpoint_num_layers, layers)
        return under_way * -(-layers // group) * kept_input + group * block
    if config.training.recompute == "selective":
        return under_way * layers * (block - attention) + attention
    return under_way * layers * block


def _loss_bytes(config: Config) -> int:
    """Chunked loss: one fp32 chunk of logits that its gradient overwrites, and fp32 gradients of the hidden states."""
    rows, hidden = config.tokenizer.padded_vocab_size, config.model.hidden_size
    batch, sequence = config.batch.train_micro_batch_size_per_gpu, config.model.seq_length
    chunk = min(LOSS_CHUNK_ROWS, batch * sequence)
    return 4 * chunk * rows // config.parallel.model_parallel_size + 4 * batch * sequence * hidden
