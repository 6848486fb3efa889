"""How fast layouts are relative to each other: a model of a cluster with a few stated numbers, not a promise.

A step is the slowest stage's micro-batches and the pipeline's bubble, then what replicas exchange. Matrix products run
at a part of the peak that falls with their size; tensor-parallel sums cross the node's links in every layer, replicas
and stages the network where they span nodes. Invariant: layouts are compared by these formulas alone, so that the order
is the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.plan.architecture import BLOCK, Layer
from megatron.config.plan.job import Job, Layout

# Share of the peak of time estimates, where nothing was measured: between the 37 % of GPT-NeoX-20B (arXiv 2204.06745)
# and the 41 to 48 % that Megatron-LM publishes for H100.
ASSUMED_MFU = 0.4


@dataclass(frozen=True)
class Cluster:
    """What the comparison assumes. Units: peak in FLOP/s of a GPU, the others in bytes/s of a GPU, one way."""

    gpus_per_node: int = 8
    peak_flops: float = 312e12
    node_bytes_s: float = 250e9
    network_bytes_s: float = 20e9
    memory_bytes_s: float = 1.5e12
    # Of the peak, for products without a narrow side; half of it where a side is as narrow as `narrow`.
    best_share: float = 0.65
    narrow: int = 256
    # Time in which nothing but a collective's first byte happens.
    latency_s: float = 20e-6


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they go to."""

    compute: float
    tensor: float
    bubble: float
    replicas: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.tensor + self.bubble + self.replicas + self.optimizer


def bubble_part(layout: Layout) -> float:
    """The part of a step in which a stage has nothing to do (1F1B): (p - 1) / (m + p - 1)."""
    return (layout.stages - 1) / (layout.accumulation + layout.stages - 1)


def step_time(job: Job, layout: Layout, cluster: Cluster) -> StepTime:
    """Seconds of one optimizer step, by the model above."""
    tokens = layout.micro_batch * job.sequence
    times = [_micro_batch(job, layout, cluster, stage, tokens) for stage in _distinct(job, layout)]
    compute, tensor = max(times, key=sum)
    slots = layout.accumulation
    return StepTime(
        compute * slots,
        tensor * slots,
        (compute + tensor) * (layout.stages - 1),
        _replicas(job, layout, cluster),
        _optimizer(job, layout, cluster),
    )


def _distinct(job: Job, layout: Layout) -> list[tuple[int, int, int]]:
    """The stages without repetitions: blocks, FLOPs of the other layers, whether something is sent on."""
    found = {
        (sum(layer.kind == BLOCK for layer in stage), _flops([x for x in stage if x.kind != BLOCK]), 1)
        for stage in job.stages(layout.stages, layout.tp)
    }
    return sorted(found)


def _flops(layers: list[Layer]) -> int:
    return sum(n for layer in layers for _, n in (*layer.flops, *layer.backward))


def _micro_batch(
    job: Job, layout: Layout, cluster: Cluster, stage: tuple[int, int, int], tokens: int
) -> tuple[float, float]:
    """Seconds of computing and of waiting for sums, forward and backward, of one micro-batch on one stage."""
    blocks, others, _ = stage
    block = next(layer for layer in job.layers(layout.tp) if layer.kind == BLOCK)
    per_block = dict(block.flops)
    passes = _flops([block])
    sums = 2 if job.model.gpt_j_residual else 4
    if layout.recompute == "full":
        passes += sum(per_block.values())
        sums += sums // 2
    elif layout.recompute == "selective":
        passes += sum(n for name, n in per_block.items() if name != "attention_output" and name != "feed_forward")
    narrow = job.model.hidden_size / layout.tp
    share = cluster.best_share * narrow / (narrow + cluster.narrow) * tokens / (tokens + cluster.narrow)
    flops = (blocks * passes + others) * tokens / layout.tp
    compute = flops / (cluster.peak_flops * share)
    # Norms, residuals and activations are read and written, not multiplied; sequence parallelism divides them.
    passes_over = 12 * (1 if layout.sequence_parallel else layout.tp) / layout.tp
    compute += blocks * passes_over * tokens * job.model.hidden_size * job.word / cluster.memory_bytes_s
    tensor = 0.0
    hidden = tokens * job.model.hidden_size * job.word
    if layout.tp > 1:
        travel = 2 * (layout.tp - 1) / layout.tp * hidden / _between(layout.tp, cluster)
        tensor = blocks * sums * (travel + cluster.latency_s)
    if layout.stages > 1:
        tensor += 2 * (hidden / _between(layout.world_size, cluster) + cluster.latency_s)
    return compute, tensor


def _replicas(job: Job, layout: Layout, cluster: Cluster) -> float:
    """Gradients added up and weights handed out again, once a step; from ZeRO 2 on, more often."""
    if layout.dp == 1:
        return 0.0
    weights = max(sum(x.numel_on_rank(layout.tp) for x in stage) for stage in job.stages(layout.stages, layout.tp))
    times = 2.0 if layout.zero == 1 else 1.0 + layout.accumulation
    if layout.zero == 3:
        times = 3.0 * layout.accumulation
    travel = times * weights * job.word * (layout.dp - 1) / layout.dp
    return travel / _between(layout.tp * layout.dp, cluster)


def _optimizer(job: Job, layout: Layout, cluster: Cluster) -> float:
    weights = max(sum(x.numel_on_rank(layout.tp) for x in stage) for stage in job.stages(layout.stages, layout.tp))
    return weights / layout.dp * 28 / cluster.memory_bytes_s


def _between(ranks: int, cluster: Cluster) -> float:
    """Bytes per second of a collective over so many neighbouring ranks."""
    return cluster.node_bytes_s if ranks <= cluster.gpus_per_node else cluster.network_bytes_s
