"""Whole training runs from a YAML file, on every rank of a warm pool; optionally killed as if by a lost machine."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint import Reader, find
from megatron.config import load
from megatron.data.indexed_writer import IndexedWriter
from megatron.engine.distributed import stop_distributed
from megatron.engine.step_guard import accept_finite
from megatron.training import loop
from megatron.training.setup import build_run

BASE: dict[str, Any] = {
    "tokenizer_type": "CharLevelTokenizer",
    "split": "8,1,1",
    "num_workers": 1,
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "seq_length": 9,
    "max_position_embeddings": 16,
    "pos_emb": "rotary",
    "rotary_pct": 0.5,
    "gpt_j_residual": True,
    "no_weight_tying": True,
    "make_vocab_size_divisible_by": 8,
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "train_iters": 6,
    "eval_interval": 3,
    "eval_iters": 1,
    "log_interval": 1,
    # The large eps keeps gradients that are zero but for rounding from becoming full steps (see layout_cases.EPS).
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1.0e-5}},
    "lr_decay_style": "cosine",
    "min_lr": 0.001,
    "warmup": 0.2,
    "checkpoint_factor": 2,
    "allow_fresh_start": True,
}


def write_dataset(folder: Path, num_documents: int = 60, seed: int = 5) -> Path:
    """Random documents of printable characters under `folder`/text_document; returns the prefix."""
    generator = np.random.default_rng(seed)
    prefix = folder / "text_document"
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(num_documents):
            size = int(generator.integers(3, 40))
            writer.add_documents(generator.integers(32, 127, size).astype(np.uint16), np.array([size], np.int32))
    return prefix


def write_config(folder: Path, name: str = "run", **changes: Any) -> Path:
    """A YAML file (JSON is YAML) of a tiny run that saves to and loads from `folder`/`name`."""
    prefix = folder / "text_document"
    if not prefix.with_name("text_document.idx").exists():
        write_dataset(folder)
    save = str(folder / name)
    values = {**BASE, "data_path": str(prefix), "save": save, "load": save, "log_dir": save, **changes}
    path = folder / f"{name}.yml"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}, indent=1))
    return path


def train_run(config_path: str, kill_after: int | None = None) -> dict[str, Any]:
    """Train as the file says; SIGKILL this rank once `kill_after` steps are done, before anything else happens."""
    config = load([config_path], devices=int(os.environ["WORLD_SIZE"]))
    run = build_run(config)
    start = run.position.step
    losses: list[float] = []
    samples: list[list[int]] = []
    step = run.engine.train_step

    def watched(batches: Any, learning_rate: float, judge: Any = accept_finite) -> Any:
        if kill_after is not None and run.position.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = step(batches, learning_rate, judge)
        losses.append(result.loss)
        samples.append([sample for batch in batches for sample in batch.sample_ids])
        return result

    run.engine.train_step = watched  # type: ignore[method-assign]
    try:
        loop.train(run)
    finally:
        run.close()
    stop_distributed()
    return {"start": start, "losses": losses, "samples": samples}


def checkpoint_tensors(folder: Path, step: int | None = None) -> dict[tuple[str, str], Any]:
    """Every tensor of a checkpoint, by (name, kind)."""
    reader = Reader(find(folder, step))
    return {(name, kind): reader.read(name, kind) for name in reader.names() for kind in reader.kinds(name)}
