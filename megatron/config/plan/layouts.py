"""Search: every layout of a number of GPUs that the rules allow, with its memory and its relative speed.

Allowed is what `megatron.config.rules` would accept. Invariant: the result is a function of the job, the batch and the
cluster alone; the YAML lines of a candidate load and give the same layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.config.layout import round_up
from megatron.config.plan.job import Job, Layout, job_of, layout_of
from megatron.config.plan.memory import MemoryEstimate, fullest
from megatron.config.plan.speed import Cluster, StepTime, step_time
from megatron.config.resolved import Config

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Blocks that are recomputed together; more rarely pay.
GROUPS = (1, 2, 4)


@dataclass(frozen=True)
class Batch:
    """Sequences of a step, and what pads the vocabulary. rows: None where padded_vocab_size was given."""

    sequences: int
    vocab_size: int | None
    divisor: int


def batch_of(config: Config) -> Batch:
    """The global batch of a configuration, and how its vocabulary is padded."""
    tokenizer = config.tokenizer
    is_padded_here = "make_vocab_size_divisible_by" in config.origin("padded_vocab_size")
    return Batch(
        config.batch.train_batch_size,
        tokenizer.vocab_size if is_padded_here else None,
        tokenizer.make_vocab_size_divisible_by,
    )


def search_config(config: Config, gpus: int, memory_bytes: float, cluster: Cluster) -> Search:
    """The search for a configuration's model and batch. Raises: ConfigError if the vocabulary's size is not known."""
    return search(job_of(config), batch_of(config), gpus, memory_bytes, cluster)


@dataclass(frozen=True)
class Candidate:
    """A layout with what it costs. speed: tokens per second, 1 for the fastest that fits."""

    layout: Layout
    memory: MemoryEstimate
    time: StepTime
    speed: float = 1.0


@dataclass(frozen=True)
class Search:
    """fitting: best first. closest: the one that needs least memory, where none fits. considered: how many there were.

    obstacles: why a family of layouts was left out, a sentence each.
    """

    fitting: list[Candidate]
    closest: Candidate | None
    considered: int
    obstacles: list[str]


def search(job: Job, batch: Batch, gpus: int, memory_bytes: float, cluster: Cluster) -> Search:
    """All layouts on `gpus` GPUs with `memory_bytes` each; of a family that differs in recomputation, the fastest."""
    fitting: list[Candidate] = []
    closest: Candidate | None = None
    considered = 0
    jobs: dict[int, Job] = {}
    for layout in layouts(job, batch, gpus, cluster.gpus_per_node):
        considered += 1
        own = jobs.setdefault(layout.tp, job if batch.vocab_size is None else _padded(job, batch, layout.tp))
        memory = fullest(own, layout)
        if memory.total <= memory_bytes:
            fitting.append(Candidate(layout, memory, step_time(own, layout, cluster)))
        elif not fitting and (closest is None or memory.total < closest.memory.total):
            closest = Candidate(layout, memory, step_time(own, layout, cluster))
    fitting.sort(key=_order)
    if fitting:
        best = fitting[0].time.total
        fitting = [dataclasses.replace(one, speed=best / one.time.total) for one in fitting]
    return Search(fitting, None if fitting else closest, considered, _obstacles(job, batch, gpus, cluster))


def configured(config: Config, found: Search, cluster: Cluster) -> Candidate | None:
    """The configuration's own layout, its speed relative to the best that was found; None where nothing was."""
    if not found.fitting:
        return None
    job, layout = job_of(config), layout_of(config)
    time = step_time(job, layout, cluster)
    per_sequence = time.total / layout.global_batch
    best = found.fitting[0]
    speed = best.time.total / best.layout.global_batch / per_sequence
    return Candidate(layout, fullest(job, layout), time, speed)


def different(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The best few that are not the same in other words: one for each stages, tensor ranks and ZeRO stage."""
    seen: set[tuple[int, int, int]] = set()
    chosen = []
    for one in candidates:
        key = (one.layout.stages, one.layout.tp, one.layout.zero)
        if key not in seen:
            seen.add(key)
            chosen.append(one)
        if len(chosen) == count:
            break
    return chosen


def layouts(job: Job, batch: Batch, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """Every layout that the rules allow, in a fixed order."""
    for tp in _divisors(min(gpus, gpus_per_node)):
        if gpus % tp or gpus_per_node % tp or not _divides(job, batch, tp):
            continue
        for stages in _divisors(gpus // tp):
            dp = gpus // (tp * stages)
            if stages > job.model.num_layers or batch.sequences % dp:
                continue
            for micro in MICRO_BATCHES:
                if batch.sequences % (dp * micro):
                    continue
                accumulation = batch.sequences // (dp * micro)
                for zero in (1, 2, 3) if stages == 1 and dp > 1 else (1,):
                    for parallel in (False, True) if tp > 1 and job.sequence % tp == 0 else (False,):
                        shape = Layout(stages, tp, dp, zero, micro, accumulation, sequence_parallel=parallel)
                        yield shape
                        yield dataclasses.replace(shape, recompute="selective")
                        for group in GROUPS:
                            if group <= -(-job.model.num_layers // stages):
                                yield dataclasses.replace(shape, recompute="full", group=group)


def explain(candidate: Candidate, cluster: Cluster) -> str:
    """Why this layout is as fast as it is: one sentence."""
    layout, time = candidate.layout, candidate.time
    parts = []
    if layout.tp > 1:
        parts.append(
            f"{layout.tp} tensor ranks within a node ({_percent(time.tensor, time)} of the time in their sums)"
        )
    if layout.stages > 1:
        parts.append(f"{layout.stages} stages with a bubble of {_percent(time.bubble, time)}")
    if layout.dp > 1:
        parts.append(f"{layout.dp} replicas that exchange for {_percent(time.replicas, time)}")
    kept = {
        "none": "nothing is recomputed",
        "selective": "attention is recomputed",
        "full": "blocks are recomputed, which costs a third more computing",
    }[layout.recompute]
    return "; ".join([*parts, kept])


def yaml_lines(layout: Layout) -> list[str]:
    """The configuration's lines for a layout."""
    truth = {True: "true", False: "false"}
    lines = [
        f"pipe_parallel_size: {layout.stages}",
        f"model_parallel_size: {layout.tp}",
        f"sequence_parallel: {truth[layout.sequence_parallel]}",
        f"zero_optimization: {{stage: {layout.zero}}}",
        f"train_batch_size: {layout.global_batch}",
        f"train_micro_batch_size_per_gpu: {layout.micro_batch}",
        f"gradient_accumulation_steps: {layout.accumulation}",
        f"checkpoint_activations: {truth[layout.recompute != 'none']}",
        f"recompute_activations: {layout.recompute}",
    ]
    if layout.recompute == "full":
        lines.append(f"checkpoint_num_layers: {layout.group}")
    return lines


def _order(candidate: Candidate) -> tuple[float, int, int, int, int]:
    # Of layouts that are equally fast, the one that divides less, then the one that needs less memory.
    layout = candidate.layout
    pieces = layout.stages * layout.tp
    return (round(candidate.time.total, 9), pieces, layout.zero, candidate.memory.total, layout.micro_batch)


def _padded(job: Job, batch: Batch, tp: int) -> Job:
    """The same job with the vocabulary padded for `tp` ranks."""
    assert batch.vocab_size is not None
    rows = round_up(batch.vocab_size, batch.divisor * tp)
    return dataclasses.replace(job, rows=rows, sizes={}, _layers={})


def _divides(job: Job, batch: Batch, tp: int) -> bool:
    model = job.model
    whole = [model.num_attention_heads, model.ffn_size]
    if batch.vocab_size is None:
        whole.append(job.rows)
    kv = model.num_kv_heads
    return all(n % tp == 0 for n in whole) and (kv % tp == 0 or tp % kv == 0)


def _obstacles(job: Job, batch: Batch, gpus: int, cluster: Cluster) -> list[str]:
    """What the numbers themselves rule out."""
    found = []
    refused = [
        tp for tp in _divisors(min(gpus, cluster.gpus_per_node)) if gpus % tp == 0 and not _divides(job, batch, tp)
    ]
    if refused:
        model = job.model
        found.append(
            f"{_listed(refused)} tensor ranks do not divide {model.num_attention_heads} heads, {model.num_kv_heads} kv "
            f"heads and {model.ffn_size} feed-forward features"
        )
    replicas = sorted({gpus // (tp * s) for tp in _divisors(gpus) for s in _divisors(gpus // tp)})
    odd = [dp for dp in replicas if batch.sequences % dp]
    if odd:
        found.append(f"{_listed(odd)} replicas do not divide train_batch_size = {batch.sequences}")
    return found


def _listed(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _percent(part: float, time: StepTime) -> str:
    return f"{100 * part / time.total:.0f} %"


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
