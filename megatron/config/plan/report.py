"""The plan as text and as plain values: layout, parameters, memory, FLOPs, tokens, time, better layouts.

Only formats; the numbers come from the modules beside it. Invariant: every line states its unit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.config.plan.data import DatasetUse, dataset_uses
from megatron.config.plan.flops import flops_per_token, step_flops_terms
from megatron.config.plan.job import job_of, layout_of
from megatron.config.plan.layouts import Candidate, Search, different, explain, yaml_lines
from megatron.config.plan.memory import LARGEST_BYTES, MemoryEstimate, estimate_memory, fullest, largest
from megatron.config.plan.parameters import count_parameters, stage_parameters
from megatron.config.plan.speed import ASSUMED_MFU, Cluster, bubble_part
from megatron.config.plan.words import bytes_text, count_text, joined, plural, repeated
from megatron.config.resolved import Config

# How many layouts a search shows.
SHOWN = 4


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What the user said of the machine. Units: bytes of memory and peak TFLOP/s of one GPU. None: not said."""

    memory_bytes: float | None = None
    peak_tflops: float | None = None


def plan_text(config: Config, hardware: Hardware | None = None) -> str:
    """The plan of a run. Raises: ConfigError if the vocabulary's size is not known."""
    hardware = hardware or Hardware()
    sections = [
        _layout(config),
        _parameters(config),
        _memory(config, hardware),
        _recomputation(config),
        _flops(config),
        _tokens(config),
        _time(config, hardware),
    ]
    if config.warnings:
        sections.append(("Notes", list(config.warnings)))
    return joined(sections)


def search_text(
    found: Search, gpus: int, memory_bytes: float, cluster: Cluster, configured: Candidate | None = None
) -> str:
    """The best layouts of a search, each with its lines of YAML. configured: the layout that the file has."""
    title = f"Layouts for {gpus} GPUs of {bytes_text(memory_bytes)}, {cluster.gpus_per_node} in a node"
    if not found.fitting:
        lines = [f"none of {found.considered:,} allowed layouts fits."]
        if found.closest is not None:
            memory = found.closest.memory
            lines += [
                f"The closest, {_shape(found.closest)}, needs {bytes_text(memory.total)} on stage {memory.stage} at "
                f"its fullest moment ({memory.moment}):",
                "; ".join(f"{name} {bytes_text(size)}" for name, size in largest(memory)[:3]),
                "Use more GPUs or more memory, ZeRO's offload_optimizer, a shorter seq_length, or a smaller model.",
            ]
        lines += found.obstacles
        return joined([(title, lines)])
    best = different(found.fitting, SHOWN)
    lines = [
        f"{len(found.fitting):,} of {found.considered:,} allowed layouts fit; the best of each kind, fastest first"
    ]
    if configured is not None:
        fits = "" if configured.memory.total <= memory_bytes else ", which is too much"
        lines.append(
            f"as configured, {_shape(configured)}: {bytes_text(configured.memory.total)}{fits}, "
            f"speed {configured.speed:.2f} of the best"
        )
    lines += found.obstacles
    for number, one in enumerate(best, 1):
        lines += [
            "",
            f"{number}. {_shape(one)}: {bytes_text(one.memory.total)} at most, speed {one.speed:.2f}",
            f"   {explain(one, cluster)}.",
            *(f"     {line}" for line in yaml_lines(one.layout)),
        ]
    assumed = (
        "",
        f"Speeds are relative, from a model with {cluster.peak_flops / 1e12:.0f} TFLOP/s, "
        f"{cluster.node_bytes_s / 1e9:.0f} GB/s within a node and {cluster.network_bytes_s / 1e9:.0f} GB/s between "
        "nodes for each GPU; within a few percent, try both.",
    )
    return joined([(title, [*lines, *assumed])])


def plan_values(config: Config, hardware: Hardware | None = None) -> dict[str, Any]:
    """The plan as plain values, for scripts. Units: bytes, FLOPs, tokens, seconds; shares between 0 and 1."""
    hardware = hardware or Hardware()
    layout, memory, count = layout_of(config), estimate_memory(config), count_parameters(config)
    tokens = config.batch.train_batch_size * config.model.seq_length
    flops, iters = flops_per_token(config), config.training.train_iters
    return {
        "layout": {**dataclasses.asdict(layout), "world_size": layout.world_size, "global_batch": layout.global_batch},
        "parameters": {**dataclasses.asdict(count), "per_stage": stage_parameters(config)},
        "memory_bytes": {
            "components": memory.components,
            "total": memory.total,
            "stage": memory.stage,
            "moment": memory.moment,
            "by_recomputation": {
                name: {"total": estimate.total, "activations": estimate.activations}
                for name, estimate in recomputations(config)
            },
            "fits": None if hardware.memory_bytes is None else memory.total <= hardware.memory_bytes,
        },
        "flops_per_token": {**step_flops_terms(config), "total": flops},
        "tokens": {"per_step": tokens, "total": tokens * iters if iters else None},
        "datasets": [dataclasses.asdict(use) for use in dataset_uses(config)],
        "bubble": bubble_part(layout),
        "time_s": run_seconds(config, hardware),
        "warnings": list(config.warnings),
    }


def search_values(found: Search, configured: Candidate | None = None) -> dict[str, Any]:
    """A search as plain values."""

    def values(one: Candidate) -> dict[str, Any]:
        return {
            "layout": dataclasses.asdict(one.layout),
            "memory_bytes": {"components": one.memory.components, "total": one.memory.total},
            "relative_speed": one.speed,
            "yaml": yaml_lines(one.layout),
        }

    return {
        "considered": found.considered,
        "fitting": len(found.fitting),
        "best": [values(one) for one in different(found.fitting, SHOWN)],
        "configured": None if configured is None else values(configured),
        "closest": None if found.closest is None else values(found.closest),
        "obstacles": found.obstacles,
    }


def recomputations(config: Config) -> list[tuple[str, MemoryEstimate]]:
    """The memory of this layout under every way to recompute."""
    job, layout = job_of(config), layout_of(config)
    per_stage = -(-config.model.num_layers // layout.stages)
    ways: list[tuple[str, dict[str, Any]]] = [
        ("none", {"recompute": "none"}),
        ("selective", {"recompute": "selective"}),
        ("full", {"recompute": "full", "group": 1}),
    ]
    groups = sorted({n for n in (2, 4, layout.group) if 1 < n <= per_stage})
    ways += [(f"full, every {n} blocks", {"recompute": "full", "group": n}) for n in groups]
    return [(name, fullest(job, dataclasses.replace(layout, **changes))) for name, changes in ways]


def run_seconds(config: Config, hardware: Hardware) -> float | None:
    """Seconds of the whole run at the assumed utilisation; None without a peak or without steps."""
    peak, iters = hardware.peak_tflops or config.observe.peak_theoretical_tflops, config.training.train_iters
    if not peak or not iters:
        return None
    tokens = iters * config.batch.train_batch_size * config.model.seq_length
    flops = tokens * flops_per_token(config)
    busy = 1 - bubble_part(layout_of(config))
    return float(flops / (config.parallel.world_size * peak * 1e12 * ASSUMED_MFU * busy))


def _layout(config: Config) -> tuple[str, list[str]]:
    parallel, batch = config.parallel, config.batch
    lines = [
        f"{plural(parallel.world_size, 'process')} ({config.origin('world_size').removeprefix('derived from ')}) = "
        f"{plural(parallel.num_stages, 'stage')} x {plural(parallel.data_parallel_size, 'replica')} x "
        f"{plural(parallel.model_parallel_size, 'tensor rank')}",
        f"ZeRO stage {config.zero.stage}, {config.precision.precision}, on {config.launcher.device}",
        f"batch: {plural(batch.train_batch_size, 'sequence')} per step = {batch.train_micro_batch_size_per_gpu} per "
        f"forward pass x {plural(batch.gradient_accumulation_steps, 'accumulation step')} x "
        f"{plural(parallel.data_parallel_size, 'replica')}",
    ]
    if parallel.num_stages > 1:
        layout = layout_of(config)
        lines.append(
            f"pipeline bubble: {100 * bubble_part(layout):.1f} % of a step = (stages - 1) / (accumulation steps + "
            f"stages - 1) = {layout.stages - 1} / {layout.accumulation + layout.stages - 1}"
        )
    return "Layout", lines


def _parameters(config: Config) -> tuple[str, list[str]]:
    count, tokenizer, tp = count_parameters(config), config.tokenizer, config.parallel.model_parallel_size
    lines = [f"{count.unique:,} unique; {count.unique - count.embedding:,} without embeddings and output head"]
    if count.trained != count.unique:
        lines.append(f"{count.trained:,} of them learn, {100 * count.trained / count.unique:.3g} %")
    if tp > 1:
        lines.append(f"{count.counted:,} as DeepSpeed counts over {tp} tensor ranks, replicated ones {tp} times")
    known = f" ({tokenizer.vocab_size:,} known ids)" if tokenizer.vocab_size else ""
    lines.append(f"{count.per_device:,} on the fullest device; vocabulary {tokenizer.padded_vocab_size:,} rows{known}")
    if config.parallel.num_stages > 1:
        lines.append(f"on a rank of each stage: {repeated([f'{n:,}' for n in stage_parameters(config)])}")
    return "Parameters", lines


def _memory(config: Config, hardware: Hardware) -> tuple[str, list[str]]:
    estimate = estimate_memory(config)
    where = "every rank is alike"
    if config.parallel.num_stages > 1:
        where = f"the worst ranks are those of stage {estimate.stage} (of 0 to {config.parallel.num_stages - 1})"
    lines = [f"{where}; fullest moment: {estimate.moment}"]
    lines += [f"{name:<32}{bytes_text(size):>12}" for name, size in estimate.components.items() if size]
    lines.append(f"{'total':<32}{bytes_text(estimate.total):>12}")
    if hardware.memory_bytes is not None:
        lines.append(_verdict(config, estimate, hardware.memory_bytes))
    elif estimate.total > LARGEST_BYTES:
        lines.append("more than any single device has: --gpus N --gpu-memory 80GB finds layouts that fit")
    return "Memory of the fullest rank, estimated", lines


def _verdict(config: Config, estimate: MemoryEstimate, available: float) -> str:
    if estimate.total <= available:
        return f"fits into {bytes_text(available)}, {bytes_text(available - estimate.total)} to spare"
    name, size = largest(estimate)[0]
    cures = [way for way, other in recomputations(config) if other.total <= available]
    cure = f" It would fit with recomputation: {', '.join(cures)}." if cures else ""
    return (
        f"DOES NOT FIT into {bytes_text(available)}: {bytes_text(estimate.total - available)} too much, most of it "
        f"{name} ({bytes_text(size)}).{cure}"
    )


def _recomputation(config: Config) -> tuple[str, list[str]]:
    asked = layout_of(config)
    lines = []
    for name, estimate in recomputations(config):
        group = asked.group if asked.recompute == "full" and asked.group > 1 else None
        is_asked = name == (f"full, every {group} blocks" if group else asked.recompute)
        mark = "   as configured" if is_asked else ""
        lines.append(f"{name:<32}{bytes_text(estimate.total):>12}  {bytes_text(estimate.activations):>12}{mark}")
    heading = f"{'':<32}{'total':>12}  {'activations':>12}"
    return "Memory by recomputation (recompute_activations)", [heading, *lines]


def _flops(config: Config) -> tuple[str, list[str]]:
    terms = step_flops_terms(config)
    total = sum(terms.values())
    lines = [f"{name:<32}{count_text(n):>12}  {100 * n / total:4.1f} %" for name, n in terms.items()]
    return "FLOPs per token, forward and backward", [
        *lines,
        f"{'total':<32}{count_text(total):>12}",
    ]


def _tokens(config: Config) -> tuple[str, list[str]]:
    batch, sequence, iters = config.batch.train_batch_size, config.model.seq_length, config.training.train_iters
    per_step = batch * sequence
    flops = flops_per_token(config)
    lines = [
        f"{per_step:,} tokens per step = {batch} sequences x {sequence} tokens; {count_text(per_step * flops)} FLOPs"
    ]
    if iters:
        tokens = iters * per_step
        lines.append(f"{tokens:,} tokens in all over {iters:,} steps; {count_text(tokens * flops)} FLOPs")
        ratio = tokens / count_parameters(config).unique
        lines.append(f"{ratio:.2g} tokens per parameter" if ratio < 1 else f"{ratio:.1f} tokens per parameter")
    lines += [_use(use) for use in dataset_uses(config)]
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


def _use(use: DatasetUse) -> str:
    if use.problem is not None:
        return f"{use.prefix}: {use.problem}"
    text = f"{use.prefix}: {use.tokens:,} tokens to train on in {use.documents:,} documents"
    return text if use.epochs is None else f"{text}, {use.epochs:.3g} epochs"


def _time(config: Config, hardware: Hardware) -> tuple[str, list[str]]:
    seconds = run_seconds(config, hardware)
    if seconds is None:
        return "Time", ["unknown: set peak_theoretical_tflops, or give --peak-tflops (an A100 has 312, an H100 989)"]
    peak = hardware.peak_tflops or config.observe.peak_theoretical_tflops
    iters, days = config.training.train_iters or 1, seconds / 86400
    length = f"{days:,.1f} days" if days >= 2 else f"{seconds / 3600:,.2f} hours"
    return "Time", [
        f"{length}, {seconds / iters:,.3g} s per step, {config.parallel.world_size * seconds / 3600:,.1f} device-hours",
        f"assumed: {100 * ASSUMED_MFU:.0f} % of {peak:g} TFLOP/s while a stage computes; no validation, no saving",
    ]


def _shape(one: Candidate) -> str:
    layout = one.layout
    recompute = f"recompute {layout.recompute}" if layout.recompute != "none" else "no recomputation"
    if layout.recompute == "full" and layout.group > 1:
        recompute += f" every {layout.group} blocks"
    return (
        f"pp {layout.stages}, tp {layout.tp}{' with sequence parallelism' if layout.sequence_parallel else ''}, "
        f"dp {layout.dp}, ZeRO {layout.zero}, micro-batch {layout.micro_batch} x {layout.accumulation}, {recompute}"
    )
