"""The two sides of the training comparisons: transformers with a plain loop, and this project's engine.

Each side is a child process that makes one optimizer step per line it reads, so that a parent can interleave the sides
and neither sees the other's memory. Invariant: both sides get the same token ids in the same order.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE = 1e-3
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
CLIP = 1.0


@dataclass(frozen=True)
class Shape:
    """A GPT-NeoX architecture (rotary quarter, parallel residual, untied head) and its batch."""

    layers: int
    hidden: int
    heads: int
    vocab: int = 50304
    seq: int = 512
    micro_batch: int = 4

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.seq * self.micro_batch


SHAPES = {
    "14m": Shape(6, 128, 4),
    "70m": Shape(6, 512, 8),
    "160m": Shape(12, 768, 12),
    "410m": Shape(24, 1024, 16),
    "1b": Shape(16, 2048, 8),
}


def tokens_of_step(shape: Shape, step: int) -> Any:
    """Token ids [micro_batch, seq + 1] of one step: few distinct ones, so that there is something to learn."""
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, shape.vocab // 50, (shape.micro_batch, shape.seq + 1), generator=generator)


def transformers_side(shape: Shape, device: str, compile_model: bool = False) -> Callable[[int], float]:
    """`GPTNeoXForCausalLM` with sdpa attention, torch's AdamW and gradient clipping, as its users write it."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        max_position_embeddings=max(2048, shape.seq),
        rotary_pct=0.25,
        use_parallel_residual=True,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = GPTNeoXForCausalLM(config).to(device).train()
    if compile_model:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=device == "cuda"
    )

    def step(number: int) -> float:
        tokens = tokens_of_step(shape, number)[:, :-1].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def own_side(shape: Shape, device: str) -> Callable[[int], float]:
    """This project's engine, DeepSpeed included."""
    import torch

    from megatron.data.loader import Batch
    from megatron.engine.distributed import start_distributed
    from megatron.engine.options import EngineOptions
    from megatron.engine.train_engine import TrainEngine
    from megatron.model.spec import ModelSpec
    from megatron.optim.build import build_optimizer
    from megatron.optim.parameter_groups import parameter_groups
    from megatron.parallel.process_groups import ProcessGroups
    from megatron.parallel.topology import Topology

    where = start_distributed()
    spec = ModelSpec(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_heads=shape.heads,
        num_kv_heads=shape.heads,
        ffn_size=4 * shape.hidden,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        max_positions=max(2048, shape.seq),
        rotary_dims=shape.hidden // shape.heads // 4,
        residual="parallel",
        tied_head=False,
        init_method="small_init",
        output_init_method="wang_init",
    )
    engine = TrainEngine(
        spec,
        ProcessGroups.build(Topology()),
        EngineOptions(
            micro_batch_size=shape.micro_batch,
            num_micro_batches=1,
            precision="bfloat16" if device == "cuda" else "fp32",
            gradient_clipping=CLIP,
        ),
        lambda named: build_optimizer(
            parameter_groups(named, weight_decay=WEIGHT_DECAY), "Adam", lr=LEARNING_RATE, betas=BETAS
        ),
        seed=0,
        device=where,
    )

    def step(number: int) -> float:
        tokens = tokens_of_step(shape, number)
        batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(shape.micro_batch, shape.seq), [number])
        return engine.train_step([batch], LEARNING_RATE).loss

    return step


class Side:
    """The parent's view of one side: a child process that steps when asked."""

    def __init__(self, name: str, shape: Shape, device: str, threads: int) -> None:
        self.name = name
        arguments = ["--side", name, "--shape", json.dumps(asdict(shape)), "--device", device]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HF_HUB_OFFLINE": "1",
        }
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        self._child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.sides", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
        )  # fmt: skip
        self.ready = self._read()

    def step(self, number: int) -> dict[str, float]:
        """One optimizer step: its loss, CPU and wall seconds, and the peak memory so far in MB."""
        assert self._child.stdin is not None
        print(number, file=self._child.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """End the child."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait(timeout=60)

    def _read(self) -> dict[str, float]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.name} side ended with status {self._child.wait()}; its messages are above")
        answer: dict[str, float] = json.loads(line)
        return answer


def serve() -> None:
    """A child's main: build one side, then step once per line of standard input."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=["transformers", "compiled", "own"], required=True)
    parser.add_argument("--shape", type=json.loads, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    # Libraries print to stdout: they get stderr, and the answers keep the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    shape = Shape(**options.shape)
    if options.side == "own":
        step = own_side(shape, options.device)
    else:
        step = transformers_side(shape, options.device, compile_model=options.side == "compiled")
    print(json.dumps({"memory_mb": _peak_mb(options.device)}), file=answers, flush=True)
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step(int(line))
        seconds = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
        print(json.dumps({"loss": loss, **seconds, "memory_mb": _peak_mb(options.device)}), file=answers, flush=True)


def _peak_mb(device: str) -> float:
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    serve()
