"""Measure what a rank holds while it trains: bytes of live tensors by component, and their peak over a step.

Runs on every rank of a warm pool, with the engine that a configuration describes. The plan never sees these figures.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron.config import Config
from megatron.data.loader import Batch
from megatron.engine.distributed import start_distributed
from megatron.engine.setup import topology
from megatron.engine.train_engine import TrainEngine
from megatron.parallel.process_groups import ProcessGroups
from megatron.training.setup import build_engine
from tests.distributed.live_memory import LiveMemory


@dataclass
class Measured:
    """Bytes. components: as the plan names them, where they can be told apart. start: most while the engine was made.

    forward: what a forward pass of one micro-batch left behind. peak: most over a whole step.
    """

    stage: int
    numel: int
    components: dict[str, int] = field(default_factory=dict)
    start: int = 0
    forward: int = 0
    peak: int = 0


def measure(config_file: str) -> Measured:
    """Two steps; the second is measured, when optimizer states exist."""
    config = Config.read(config_file)
    device = start_distributed()
    groups = ProcessGroups.build(topology(config), sequence_parallel=config.parallel.sequence_parallel)
    memory = LiveMemory()
    with memory:
        engine = build_engine(config, groups, device)
        measured = Measured(groups.at.pp_rank, sum(p.numel() for _, p in engine.named_parameters), start=memory.peak)
        engine.train_step(_batches(config, 0), 1e-3)
        gc.collect()
        left = _watch_forward(engine, memory)
        with memory.peak_within() as peak:
            engine.train_step(_batches(config, 1), 1e-3)
    measured.peak, measured.forward = peak[0], left[0]
    measured.components = _components(engine)
    return measured


def _batches(config: Config, step: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(step)
    shape = (config.batch.train_micro_batch_size_per_gpu, config.model.seq_length)
    found = []
    for _ in range(config.batch.gradient_accumulation_steps):
        tokens = torch.randint(0, config.tokenizer.vocab_size, shape, generator=generator)
        # Of labels, 0 and 1 exist everywhere; of answers, 1 is the start and 2 the end.
        classes = config.tokenizer.vocab_size if config.model.task == "causal_lm" else 2
        labels = torch.randint(0, classes, shape, generator=generator)
        found.append(Batch(tokens, labels, torch.ones(shape), list(range(shape[0]))))
    return found


def _watch_forward(engine: TrainEngine, memory: LiveMemory) -> list[int]:
    """Note by how much each forward pass raises the level."""
    found: list[int] = []
    inner = engine.deepspeed

    def watched(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            before = memory.live
            result = function(*args, **kwargs)
            found.append(memory.live - before)
            return result

        return call

    if engine.is_staged:
        known = inner._INSTRUCTION_MAP
        forward = watched(next(f for kind, f in known.items() if kind.__name__ == "ForwardPass"))
        inner._INSTRUCTION_MAP = {k: forward if k.__name__ == "ForwardPass" else f for k, f in known.items()}
    else:
        inner.forward = watched(inner.forward)
    return found


def _components(engine: TrainEngine) -> dict[str, int]:
    optimizer = engine.deepspeed.optimizer
    # ZeRO 3 empties its parameter groups between steps.
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None) or [
        p for group in optimizer.optimizer.param_groups for p in group["params"]
    ]
    states = [t for state in optimizer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    weights = [p.ds_tensor if hasattr(p, "ds_tensor") else p for _, p in engine.named_parameters]
    return {
        "weights": _bytes(weights),
        "fp32 master weights": _bytes(masters),
        "optimizer states": _bytes(states),
    }


def _bytes(tensors: list[torch.Tensor]) -> int:
    """Elements that the tensors show, not the padded buffers behind them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure_on_gpu(config_file: str) -> int:
    """Bytes that tensors took at most over a whole step, as CUDA's allocator counts."""
    config = Config.read(config_file)
    device = start_distributed("cuda")
    engine = build_engine(config, ProcessGroups.build(topology(config)), device)
    engine.train_step(_batches(config, 0), 1e-3)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    engine.train_step(_batches(config, 1), 1e-3)
    return int(torch.cuda.max_memory_allocated(device))
