"""The plan as text: layout, batch, parameters, memory, FLOPs, tokens, schedule.

Only formats; the numbers come from the modules beside it. Invariant: every line states its unit.
"""

from __future__ import annotations

from megatron.config.plan.flops import FORWARD_AND_BACKWARD, flops_terms
from megatron.config.plan.memory import estimate_memory
from megatron.config.plan.parameters import count_parameters
from megatron.config.resolved import Config


def plan_text(config: Config) -> str:
    """The plan of a run. Raises: ConfigError if the vocabulary's size is not known."""
    sections = [_layout(config), _parameters(config), _memory(config), _flops(config), _tokens(config)]
    if config.warnings:
        sections.append(("Notes", list(config.warnings)))
    lines: list[str] = []
    for title, body in sections:
        lines += [title, *(f"  {line}" for line in body), ""]
    return "\n".join(lines).rstrip()


def _layout(config: Config) -> tuple[str, list[str]]:
    parallel, batch = config.parallel, config.batch
    return "Layout", [
        f"{parallel.world_size} processes ({config.origin('world_size').removeprefix('derived from ')}) = "
        f"{parallel.num_stages} stages x {parallel.data_parallel_size} replicas x {parallel.model_parallel_size} "
        "tensor ranks",
        f"ZeRO stage {config.zero.stage}, {config.precision.precision}, on {config.launcher.device}",
        f"batch: {batch.train_batch_size} sequences per step = {batch.train_micro_batch_size_per_gpu} per forward pass "
        f"x {batch.gradient_accumulation_steps} accumulation steps x {parallel.data_parallel_size} replicas",
    ]


def _parameters(config: Config) -> tuple[str, list[str]]:
    count, tokenizer, tp = count_parameters(config), config.tokenizer, config.parallel.model_parallel_size
    lines = [f"{count.unique:,} unique; {count.unique - count.embedding:,} without embeddings and output head"]
    if tp > 1:
        lines.append(f"{count.counted:,} as DeepSpeed counts over {tp} tensor ranks, replicated ones {tp} times")
    known = f" ({tokenizer.vocab_size:,} known ids)" if tokenizer.vocab_size else ""
    lines.append(f"{count.per_device:,} on the fullest device; vocabulary {tokenizer.padded_vocab_size:,} rows{known}")
    return "Parameters", lines


def _memory(config: Config) -> tuple[str, list[str]]:
    estimate = estimate_memory(config)
    where = f" (stage {estimate.stage} of {config.parallel.num_stages})" if config.parallel.num_stages > 1 else ""
    lines = [f"{name:<22}{_bytes(size):>12}" for name, size in estimate.components.items() if size]
    return f"Memory of the fullest device{where}, estimated", [*lines, f"{'total':<22}{_bytes(estimate.total):>12}"]


def _flops(config: Config) -> tuple[str, list[str]]:
    terms = flops_terms(config)
    total = sum(terms.values())
    lines = [f"{name:<22}{_count(FORWARD_AND_BACKWARD * n):>12}  {100 * n / total:4.1f} %" for name, n in terms.items()]
    return "FLOPs per token, forward and backward", [*lines, f"{'total':<22}{_count(FORWARD_AND_BACKWARD * total):>12}"]


def _tokens(config: Config) -> tuple[str, list[str]]:
    batch, sequence, iters = config.batch.train_batch_size, config.model.seq_length, config.training.train_iters
    per_step = batch * sequence
    flops = FORWARD_AND_BACKWARD * sum(flops_terms(config).values())
    lines = [f"{per_step:,} tokens per step = {batch} sequences x {sequence} tokens; {_count(per_step * flops)} FLOPs"]
    if iters:
        tokens = iters * per_step
        lines.append(f"{tokens:,} tokens in all over {iters:,} steps; {_count(tokens * flops)} FLOPs")
        ratio = tokens / count_parameters(config).unique
        lines.append(f"{ratio:.1f} tokens per parameter")
    schedule, optimizer = config.schedule, config.optimizer
    if optimizer.lr is not None and schedule.lr_decay_iters:
        rise = schedule.warmup * schedule.lr_decay_iters
        lines.append(
            f"{optimizer.type}, learning rate 0 to {optimizer.lr:g} over {rise:,.0f} steps, then "
            f"{schedule.lr_decay_style}"
            + (
                ""
                if schedule.lr_decay_style == "constant"
                else f" to {schedule.min_lr:g} at step {schedule.lr_decay_iters:,}"
            )
            + f"; weight decay {optimizer.weight_decay:g}, clipping {optimizer.gradient_clipping:g}"
        )
    return "Training", lines


def _bytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e8 else f"{size / 1e6:,.2f} MB"


def _count(number: float) -> str:
    for power, letter in ((24, "Y"), (21, "Z"), (18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M")):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {letter}"
    return f"{number:,.0f} "
