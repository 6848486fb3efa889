"""Memory of the fullest rank, by component, at the moment when it is fullest: worked out from shapes.

A step has several candidates for its peak, and which one wins depends on the layout: the forward pass (activations and
the loss), the backward pass (gradients and what is recomputed), the optimizer's step (copies of the gradients), and the
start (whole fp32 weights before ZeRO divides them). Each is a sum over components; the largest is reported. The figures
are bytes of live tensors, tested against measured ones; what the allocator and the runtime add is a margin beside them.
Invariant: nothing is allocated, and equal configurations give equal numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.plan.architecture import BLOCK, Kept
from megatron.config.plan.job import Job, Layout, job_of, layout_of
from megatron.config.resolved import Config

# Rows of logits at a time: megatron.ops.cross_entropy's choice for each device.
LOSS_CHUNK_ROWS = {"cpu": 128, "cuda": 2048}
# The CUDA context, NCCL's buffers and libraries; a Python process with torch and DeepSpeed.
RUNTIME_BYTES = {"cuda": 2_000_000_000, "cpu": 400_000_000}
# What a caching allocator loses to rounding and fragments.
MARGIN_PART = 0.06
# DeepSpeed's BF16 optimizer flattens so many elements at a time, whatever the bucket sizes say.
BF16_BUCKET = 500_000_000
# Hidden states of a micro-batch that DeepSpeed's pipeline holds between stages, beside what the stage itself keeps:
# what it receives, what it has sent, their gradients. Measured on its first, middle and last stages.
PIPELINE_BUFFERS = {"first": 1, "middle": 3, "last": 6}
# Beyond this, no device helps but a division does.
LARGEST_BYTES = 288e9
PASSES = "forward and backward pass"
MARGIN, RUNTIME = "fragmentation margin", "runtime (context, libraries)"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by component on the fullest rank. stage: its pipeline stage. moment: when it is fullest.

    activations: of the passes, kept and made again, whether or not they make the fullest moment.
    """

    components: dict[str, int]
    stage: int
    moment: str
    activations: int

    @property
    def tensors(self) -> int:
        """Bytes of live tensors."""
        return sum(size for name, size in self.components.items() if name not in (MARGIN, RUNTIME))

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.components.values())


@dataclass(frozen=True)
class StageSize:
    """What one rank of a stage holds. numel: elements. trained: of these, that learn. small: in parameters that ZeRO 3
    does not divide.
    """

    numel: int
    trained: int
    small: int
    blocks: int
    # Bytes of one token: of all blocks, of their attention; of the largest block, its attention's part, a block's
    # input; of the other layers.
    all_blocks: float
    all_attention: float
    block: float
    attention: float
    block_input: float
    others: float
    is_first: bool
    is_last: bool


def largest(estimate: MemoryEstimate) -> list[tuple[str, int]]:
    """The components that a layout can change, largest first."""
    found = [(name, size) for name, size in estimate.components.items() if name not in (MARGIN, RUNTIME)]
    return sorted(found, key=lambda item: -item[1])


def estimate_memory(config: Config) -> MemoryEstimate:
    """Estimate each stage and take the fullest. Raises: ConfigError if the vocabulary's size is not known."""
    return fullest(job_of(config), layout_of(config))


def estimate_stage(config: Config, stage: int) -> MemoryEstimate:
    """The estimate of one stage. Raises: ConfigError if the vocabulary's size is not known."""
    job, layout = job_of(config), layout_of(config)
    return _estimate(job, layout, stage_sizes(job, layout)[stage], stage)


def stage_moments(config: Config, stage: int) -> dict[str, dict[str, float]]:
    """Bytes by component at each moment of a step that may be the fullest, on one stage, without margins."""
    job, layout = job_of(config), layout_of(config)
    return _moments(job, layout, stage_sizes(job, layout)[stage], stage)


def fullest(job: Job, layout: Layout) -> MemoryEstimate:
    """The estimate of the fullest stage; of equally full ones the first."""
    best: MemoryEstimate | None = None
    seen: set[StageSize] = set()
    for stage, size in enumerate(stage_sizes(job, layout)):
        # Of stages alike, the first has the most micro-batches under way.
        if size in seen:
            continue
        seen.add(size)
        estimate = _estimate(job, layout, size, stage)
        if best is None or estimate.total > best.total:
            best = estimate
    assert best is not None
    return best


def stage_sizes(job: Job, layout: Layout) -> tuple[StageSize, ...]:
    """The sizes of all stages."""
    key = (layout.stages, layout.tp, layout.sequence_parallel, layout.micro_batch)
    if key not in job.sizes:
        job.sizes[key] = _stage_sizes(job, layout)
    found: tuple[StageSize, ...] = job.sizes[key]
    return found


def _stage_sizes(job: Job, layout: Layout) -> tuple[StageSize, ...]:
    def size_of(kept: tuple[Kept, ...], **wanted: bool) -> float:
        total = 0.0
        for item in kept:
            if item.only_on not in (None, job.device) or any(getattr(item, k) != v for k, v in wanted.items()):
                continue
            if item.only_half and job.word == 4:
                continue
            parts = layout.tp if item.divided or (item.over_tokens and layout.sequence_parallel) else 1
            shared = layout.micro_batch if item.of_batch else 1
            total += item.size * (item.word or job.word) / parts / shared
        return total

    found = []
    stages = job.stages(layout.stages, layout.tp)
    for number, stage in enumerate(stages):
        # Before the first parameter that learns, nothing waits for a backward pass; stages are asked for one, the first
        # behind the embeddings.
        frozen = next((n for n, x in enumerate(stage) if x.trained_on_rank(1)), 0) if number == 0 else 0
        frozen = min(frozen, 1) if layout.stages > 1 else frozen
        passed = stage[frozen:]
        blocks = [layer for layer in passed if layer.kind == BLOCK]
        whole = [size_of(block.kept) for block in blocks]
        attention = [size_of(block.kept, in_attention=True) for block in blocks]
        # Recomputation keeps it for every block, whoever asks for it.
        entering = next((x for layer in stage for x in layer.kept if x.is_input), None) if blocks else None
        found.append(
            StageSize(
                numel=sum(layer.numel_on_rank(layout.tp) for layer in stage),
                trained=sum(layer.trained_on_rank(layout.tp) for layer in stage),
                small=sum(
                    n
                    for layer in stage
                    for p in layer.parameters
                    if (n := p.numel // (layout.tp if p.sharded else 1)) <= job.persistence
                ),
                blocks=len(blocks),
                all_blocks=sum(whole),
                all_attention=sum(attention),
                block=max(whole, default=0.0),
                attention=max(attention, default=0.0),
                block_input=size_of((entering,)) if entering is not None else 0.0,
                others=sum(size_of(layer.kept) for layer in passed if layer.kind != BLOCK),
                is_first=number == 0,
                is_last=number == len(stages) - 1,
            )
        )
    return tuple(found)


def _estimate(job: Job, layout: Layout, size: StageSize, stage: int) -> MemoryEstimate:
    moments = _moments(job, layout, size, stage)
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    components = {name: int(value) for name, value in moments[moment].items()}
    components[MARGIN] = int(MARGIN_PART * sum(components.values()))
    components[RUNTIME] = RUNTIME_BYTES[job.device]
    passes = moments[PASSES]
    return MemoryEstimate(components, stage, moment, int(passes["activations"] + passes["working memory"]))


def _moments(job: Job, layout: Layout, size: StageSize, stage: int) -> dict[str, dict[str, float]]:
    """Components at each moment that may be the peak."""
    numel, trained, dp, word = size.numel, size.trained, layout.dp, job.word
    states = {
        "weights": numel * word / (dp if layout.zero == 3 else 1),
        "fp32 master weights": 0 if job.offloads else 4 * trained / dp,
        "optimizer states": 0 if job.offloads else 4 * job.optimizer_words * trained / dp,
    }
    always, made = _gradient_bytes(job, layout, trained)
    under_way = min(layout.accumulation, layout.stages - stage)
    # Before the first backward pass there are no gradients; with as many micro-batches under way as there are in all,
    # all of them are then alive.
    is_steady = layout.accumulation > under_way
    kept, again = _activation_bytes(job, layout, size)
    loss = _loss_bytes(job, layout) if size.is_last else 0
    passing = states | _gathered(job, layout, size) | {"pipeline buffers": _pipeline_bytes(job, layout, size)}
    backward = again + _backward_bytes(job, layout)
    forward = _loss_scratch_bytes(job, layout) if size.is_last else 0
    group = _group(layout, size)
    part = min(1.0, group / size.blocks) if size.blocks else 1.0
    bucket = _bucket_bytes(job, layout, trained)
    # From ZeRO 2 on, buckets of gradients leave while the backward pass runs: the first, when it is full.
    leaving = bucket if layout.zero > 1 else 0
    part = max(part, 1 - job.bucket / trained) if layout.zero > 1 and trained else part
    moments = {
        PASSES: passing
        | {
            "gradients": always + (made if is_steady else 0),
            "activations": under_way * kept,
            "loss and head's gradient": loss,
            "working memory": max(forward, backward),
        },
        "end of the first backward pass": passing
        | {
            "gradients": always + made * (1 if is_steady else 1 - part),
            "activations": (under_way - 1 + part) * kept,
            "working memory": backward,
            "communication buckets": leaving,
        },
        "optimizer step": states
        | {
            "gradients": always + made,
            "activations": 0,
            "communication buckets": max(bucket, _step_bytes(job, layout, trained)),
        },
    }
    if layout.zero == 3:
        moments["optimizer step"]["gathered weights"] = size.small * word
    return moments


def _gradient_bytes(job: Job, layout: Layout, numel: int) -> tuple[float, float]:
    """What gradients take from the start to the end, and what they take on top once a backward pass is over."""
    if layout.zero == 1:
        # DeepSpeed's BF16 optimizer adds up in fp32, beside the bf16 gradients that autograd makes.
        return (4 * numel, 2 * numel) if job.accumulates_apart else (0, job.word * numel)
    part = job.accumulation_word * numel / layout.dp
    return (part, 0) if layout.zero == 3 else (0, part)


def _gathered(job: Job, layout: Layout, size: StageSize) -> dict[str, float]:
    """ZeRO 3: whole weights that are alive during the passes."""
    if layout.zero != 3:
        return {}
    return {"gathered weights": job.word * min(size.numel, max(size.small, job.live_parameters))}


def _pipeline_bytes(job: Job, layout: Layout, size: StageSize) -> float:
    if layout.stages == 1:
        return 0
    place = "first" if size.is_first else "last" if size.is_last else "middle"
    parts = layout.tp if layout.sequence_parallel else 1
    return PIPELINE_BUFFERS[place] * layout.micro_batch * job.sequence * job.model.hidden_size * job.word / parts


def _activation_bytes(job: Job, layout: Layout, size: StageSize) -> tuple[float, float]:
    """Of one micro-batch: what is kept for the backward pass, and what the backward pass makes again at a time."""
    tokens = layout.micro_batch * job.sequence
    # A stage keeps what it hands on until the next one has it; the next one's copy is its first block's input.
    outside = size.others + (0 if size.is_last else size.block_input)
    if layout.recompute == "full" and size.blocks:
        group = _group(layout, size)
        kept = -(-size.blocks // group) * size.block_input
        return tokens * (kept + outside), tokens * (group * size.block - size.block_input)
    if layout.recompute == "selective":
        return tokens * (size.all_blocks - size.all_attention + outside), tokens * size.attention
    return tokens * (size.all_blocks + outside), 0


def _group(layout: Layout, size: StageSize) -> int:
    return max(1, min(layout.group, size.blocks)) if layout.recompute == "full" else 1


def _backward_bytes(job: Job, layout: Layout) -> float:
    """Gradients of activations on their way through a block: the feed-forward's, and the residual stream's twice."""
    model, tokens = job.model, layout.micro_batch * job.sequence
    width = model.ffn_size // layout.tp * (2 if model.is_gated else 1)
    return tokens * job.word * (width + 2 * model.hidden_size)


def _loss_bytes(job: Job, layout: Layout) -> float:
    """The gradients that the loss makes in the forward pass, in fp32: of the hidden states and of the head."""
    tokens, hidden = layout.micro_batch * job.sequence, job.model.hidden_size
    if job.model.task == "question_answering":
        # Made in the backward pass, in the precision of the hidden states.
        return job.word * tokens * hidden
    head = 4 * job.head_rows(layout.tp) * hidden if job.trains_head(layout.tp) else 0
    return 4 * tokens * hidden + head


def _loss_scratch_bytes(job: Job, layout: Layout) -> float:
    """A chunk of logits, in fp32 and on a GPU in half precision too; the normed hidden states, whole."""
    tokens, hidden, rows = layout.micro_batch * job.sequence, job.model.hidden_size, job.head_rows(layout.tp)
    chunk, half = min(LOSS_CHUNK_ROWS[job.device], tokens), job.word == 2
    scratch = 4 * chunk * (rows + hidden) + job.word * tokens * hidden
    if job.device == "cpu":
        # A product as large as the head's gradient, and with half precision an fp32 copy of the head.
        return scratch + 4 * rows * hidden * (2 if half else 1)
    return scratch + (2 * chunk * rows if half else 0)


def _bucket_bytes(job: Job, layout: Layout, numel: int) -> float:
    """A flat copy of the gradients that travel together."""
    if layout.zero == 1 and job.accumulates_apart:
        return 6 * min(numel, BF16_BUCKET) if layout.dp > 1 or layout.stages > 1 else 0
    # From stage 2 on, those of the bucket themselves as well.
    return (1 if layout.zero == 1 else 2) * job.word * min(numel, job.bucket)


def _step_bytes(job: Job, layout: Layout, numel: int) -> float:
    """Flat copies of a rank's gradients in the optimizer's step: as they came, and in fp32 if they came otherwise."""
    if layout.zero == 3 or (layout.zero == 1 and job.accumulates_apart):
        return 0
    return (4 if job.word == 4 else 6) * numel / layout.dp
