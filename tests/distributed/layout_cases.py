"""Train a tiny model on synthetic batches at any layout; runs on every rank of a warm pool.

The batches of a step are a function of the step alone, cut over data-parallel ranks and micro-batches as the loader
does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.data.loader import Batch
from megatron.engine.distributed import start_distributed
from megatron.engine.options import EngineOptions
from megatron.engine.state import export_pieces
from megatron.engine.train_engine import TrainEngine
from megatron.model.lora import is_trained
from megatron.model.recompute import Recompute
from megatron.model.spec import ModelSpec
from megatron.model.width_scaling import lr_factor
from megatron.optim.build import build_optimizer
from megatron.optim.parameter_groups import parameter_groups
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.sharding import ShardSpec
from megatron.parallel.topology import Topology

SEQ_LENGTH = 12

# A key's bias on unrotated dims has no effect on the softmax, so its gradient is zero but for rounding. Adam divides
# by the size of the gradient and would blow that noise up to full steps; a larger eps keeps it noise.
EPS = 1e-5
LEARNING_RATE, WEIGHT_DECAY, BETAS, SEED = 3e-3, 0.1, (0.9, 0.95), 3


def learning_rate(step: int) -> float:
    """A falling schedule, so that a step more or less would show."""
    return LEARNING_RATE * (1 - step / 40)


def tiny_spec(**changes: Any) -> ModelSpec:
    """A model of odd sizes: vocabulary padded from 91 to 96, four layers, two kv heads' worth of tensor parallelism."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 24,
        "num_heads": 4,
        "num_kv_heads": 4,
        "ffn_size": 40,
        "vocab_size": 91,
        "padded_vocab_size": 96,
        "max_positions": 16,
        "rotary_dims": 4,
        "residual": "parallel",
        "tied_head": False,
        "init_method": "small_init",
        "output_init_method": "wang_init",
    }
    return ModelSpec(**{**values, **changes})


@dataclass(frozen=True)
class Case:
    """One training run of a few steps."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero_stage: int = 1
    sequence_parallel: bool = False
    precision: str = "fp32"
    initial_scale_power: int = 8
    global_batch: int = 8
    micro_batch: int = 2
    steps: int = 20
    clipping: float = 0.5
    normalization: str = "micro_batch"
    recompute: bool = False
    compile_blocks: bool = False
    is_masked: bool = False
    # Sequences without any unmasked token at the head of a step; unset, the first micro-batch.
    masked_rows: int | None = None
    evaluates: bool = False
    seq_length: int = SEQ_LENGTH
    partition_method: str = "uniform"
    eps: float = EPS
    seed: int = SEED
    spec: dict[str, Any] = field(default_factory=dict)
    # Patterns of parameters that stay as they are; with low-rank updates in the spec all other weights do.
    frozen: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Ranks that the case needs."""
        return self.tp * self.pp * self.dp

    def is_trained(self, name: str) -> bool:
        """Whether a parameter learns."""
        return is_trained(name, tiny_spec(**self.spec), (), self.frozen)

    def lr_factor(self, name: str) -> float:
        """Of a parameter, for Adam."""
        return lr_factor(name, tiny_spec(**self.spec), "adam")

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step on one rank."""
        return self.global_batch // (self.micro_batch * self.dp)


def global_batch(step: int, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, labels, loss mask of a whole step, [global batch, S]."""
    generator = torch.Generator().manual_seed(1000 + step)
    vocab_size = tiny_spec(**case.spec).vocab_size
    text = torch.randint(0, vocab_size, (case.global_batch, case.seq_length + 1), generator=generator)
    mask = torch.ones(case.global_batch, case.seq_length)
    if case.is_masked:
        mask = (torch.rand(mask.shape, generator=generator) < 0.5).float()
        rows = case.micro_batch if case.masked_rows is None else case.masked_rows
        if rows < case.global_batch:
            mask[:rows] = 0.0
    spec = tiny_spec(**case.spec)
    if spec.task == "question_answering":
        places = torch.rand(case.global_batch, case.seq_length, generator=generator).argsort(1)[:, :2].sort(1).values
        labels = torch.zeros(case.global_batch, case.seq_length, dtype=torch.int64)
        labels.scatter_(1, places[:, :1], 1)
        labels.scatter_add_(1, places[:, 1:], torch.full_like(places[:, 1:], 2))
        return text[:, :-1].contiguous(), labels, mask
    if spec.task != "causal_lm":
        labels = torch.randint(0, spec.num_labels, mask.shape, generator=generator)
        return text[:, :-1].contiguous(), labels, mask
    return text[:, :-1].contiguous(), text[:, 1:].contiguous(), mask


def rank_batches(step: int, case: Case, dp_rank: int) -> list[Batch]:
    """This rank's micro-batches, cut as megatron.data.loader cuts them."""
    tokens, labels, mask = global_batch(step, case)
    rows, batches = case.micro_batch, []
    for micro in range(case.accumulation):
        first = (micro * case.dp + dp_rank) * rows
        part = slice(first, first + rows)
        batches.append(Batch(tokens[part], labels[part], mask[part], list(range(first, first + rows))))
    return batches


def make_engine(case: Case) -> TrainEngine:
    """The engine of this rank, from seed 3."""
    device = start_distributed()
    groups = ProcessGroups.build(Topology(case.pp, case.dp, case.tp), sequence_parallel=case.sequence_parallel)
    options = EngineOptions(
        micro_batch_size=case.micro_batch,
        num_micro_batches=case.accumulation,
        precision=case.precision,  # type: ignore[arg-type]
        fp16={"initial_scale_power": case.initial_scale_power, "hysteresis": 1} if case.precision == "fp16" else {},
        gradient_clipping=case.clipping,
        zero_stage=case.zero_stage,
        loss_normalization=case.normalization,  # type: ignore[arg-type]
        partition_method=case.partition_method,
    )
    return TrainEngine(
        tiny_spec(**case.spec),
        groups,
        options,
        lambda named: build_optimizer(
            parameter_groups(named, WEIGHT_DECAY, case.lr_factor), "adam", lr=LEARNING_RATE, betas=BETAS, eps=case.eps
        ),
        seed=case.seed,
        device=device,
        recompute=Recompute("full" if case.recompute else "none"),
        compile_blocks=case.compile_blocks,
        is_trained=case.is_trained,
    )


@dataclass(frozen=True)
class Fragment:
    """A piece of a logical tensor, sent back to the test."""

    name: str
    kind: str
    spec: ShardSpec
    tp_rank: int
    tp_size: int
    start: int
    values: Any
    replica: bool


def fragments(engine: TrainEngine) -> list[Fragment]:
    """What this rank would write into a checkpoint."""
    return [
        Fragment(
            p.name, p.kind, p.spec, p.tp_rank, p.tp_size, p.start, p.tensor.float().numpy().copy().ravel(), p.replica
        )
        for p in export_pieces(engine)
    ]


def train_case(case: Case) -> dict[str, Any]:
    """Train and return losses, gradient norms, a validation loss and this rank's fragments."""
    engine = make_engine(case)
    losses, norms = [], []
    for step in range(case.steps):
        result = engine.train_step(rank_batches(step, case, engine.groups.dp_rank), learning_rate(step))
        losses.append(result.loss)
        norms.append(result.grad_norm)
        if case.evaluates:
            engine.evaluate(rank_batches(20_000 + step, case, engine.groups.dp_rank))
    valid = engine.evaluate(rank_batches(10_000, case, engine.groups.dp_rank))
    return {"losses": losses, "norms": norms, "valid": valid, "fragments": fragments(engine)}


def assemble(results: list[dict[str, Any]], kind: str = "weight") -> dict[str, torch.Tensor]:
    """Whole logical tensors from the fragments of all ranks; every element must be given exactly once."""
    shards: dict[tuple[str, int], torch.Tensor] = {}
    seen: dict[tuple[str, int], torch.Tensor] = {}
    specs: dict[str, tuple[ShardSpec, int]] = {}
    for fragment in (f for result in results for f in result["fragments"] if f.kind == kind):
        if fragment.replica or (fragment.spec.dim is None and fragment.tp_rank):
            continue
        key = (fragment.name, fragment.tp_rank)
        numel = fragment.spec.shard_numel(fragment.tp_size)
        stop = fragment.start + len(fragment.values)
        shards.setdefault(key, torch.zeros(numel))[fragment.start : stop] = torch.from_numpy(fragment.values)
        seen.setdefault(key, torch.zeros(numel, dtype=torch.int))[fragment.start : stop] += 1
        specs[fragment.name] = (fragment.spec, fragment.tp_size)
    assert all(bool((count == 1).all()) for count in seen.values()), "fragments overlap or leave gaps"
    whole = {}
    for name, (spec, tp_size) in specs.items():
        ranks = range(tp_size if spec.dim is not None else 1)
        parts = [shards[name, rank].view(spec.shard_shape(tp_size)) for rank in ranks]
        whole[name] = torch.cat(parts, spec.dim) if spec.dim is not None else parts[0]
    return whole
