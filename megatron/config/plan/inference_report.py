"""The plan of generation or evaluation as text and as plain values. Only formats; the numbers are those of `inference`.

Invariant: as in `report`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron.config.plan.flops import flops_terms
from megatron.config.plan.inference import (
    Purpose,
    estimate_inference,
    fitting_tensor_ranks,
    inference_layout,
    inference_values,
)
from megatron.config.plan.memory import LARGEST_BYTES
from megatron.config.plan.parameters import count_parameters
from megatron.config.plan.report import Hardware
from megatron.config.plan.words import bytes_text, count_text, joined, plural
from megatron.config.resolved import Config


def inference_plan_text(config: Config, purpose: Purpose, hardware: Hardware | None = None) -> str:
    """The plan of generate.py or evaluate.py. Raises: ConfigError if the vocabulary's size is not known."""
    hardware = hardware or Hardware()
    sections = [
        _layout(config, purpose),
        _parameters(config),
        _memory(config, purpose, hardware),
        _flops(config),
    ]
    if config.warnings:
        sections.append(("Notes", list(config.warnings)))
    return joined(sections)


def inference_plan_values(config: Config, purpose: Purpose, hardware: Hardware | None = None) -> dict[str, Any]:
    """The same as plain values. Units: bytes, FLOPs, tokens."""
    layout, terms = inference_layout(config), flops_terms(config)
    return {
        "layout": {"model_parallel_size": layout.tp, "replicas": _replicas(config), "world_size": _processes(config)},
        "parameters": dataclasses.asdict(count_parameters(config)),
        "memory_bytes": inference_values(config, purpose, (hardware or Hardware()).memory_bytes),
        "flops_per_token": {**terms, "total": sum(terms.values())},
        "warnings": list(config.warnings),
    }


def _processes(config: Config) -> int:
    return int(config.parallel.world_size or 1)


def _replicas(config: Config) -> int:
    return _processes(config) // inference_layout(config).tp


def _layout(config: Config, purpose: Purpose) -> tuple[str, list[str]]:
    tp, estimate = inference_layout(config).tp, estimate_inference(config, purpose)
    what = "prompts continued together" if purpose == "generate" else "sequences per forward pass"
    precision: str = config.precision.precision
    if config.launcher.device != "cuda" and precision == "fp16":
        precision = "fp32 (fp16 was asked for; a CPU computes in fp32)"
    return "Layout", [
        f"{plural(_processes(config), 'process')} = {plural(_replicas(config), 'replica')} x "
        f"{plural(tp, 'tensor rank')}; no pipeline stages, no optimizer",
        f"{precision}, on {config.launcher.device}",
        f"at most {estimate.rows} {what}, each of at most {estimate.positions:,} tokens",
    ]


def _parameters(config: Config) -> tuple[str, list[str]]:
    count, rows = count_parameters(config), config.tokenizer.padded_vocab_size
    return "Parameters", [
        f"{count.unique:,} unique; {count.unique - count.embedding:,} without embeddings and output head",
        f"vocabulary {rows:,} rows",
    ]


def _memory(config: Config, purpose: Purpose, hardware: Hardware) -> tuple[str, list[str]]:
    estimate = estimate_inference(config, purpose)
    lines = [f"{name:<32}{bytes_text(size):>12}" for name, size in estimate.components.items() if size]
    lines.append(f"{'total':<32}{bytes_text(estimate.total):>12}")
    if estimate.cache_if_asked:
        lines.append(f"tasks that generate text keep keys and values too: {bytes_text(estimate.cache_if_asked)} more")
    available = hardware.memory_bytes
    if available is None:
        if estimate.total > LARGEST_BYTES:
            lines.append("more than any single device has: --gpus N --gpu-memory 80GB says how to divide it")
    elif estimate.total <= available:
        lines.append(f"fits into {bytes_text(available)}, {bytes_text(available - estimate.total)} to spare")
    else:
        ranks = fitting_tensor_ranks(config, purpose, available)
        cure = f" It fits with model_parallel_size: {ranks}." if ranks else " No model_parallel_size makes it fit."
        lines.append(
            f"DOES NOT FIT into {bytes_text(available)}: {bytes_text(estimate.total - available)} too much.{cure}"
        )
    return "Memory of a rank, estimated", lines


def _flops(config: Config) -> tuple[str, list[str]]:
    terms = flops_terms(config)
    total = sum(terms.values())
    lines = [f"{name:<32}{count_text(n):>12}  {100 * n / total:4.1f} %" for name, n in terms.items()]
    title = f"FLOPs per token, forward, that sees {config.model.seq_length:,} tokens"
    return title, [*lines, f"{'total':<32}{count_text(total):>12}"]
