"""Training on one GPU in bf16: tokens per second and peak memory, this project's engine against transformers.

    python benchmarks/train_gpu.py [--shape 410m] [--seq 2048] [--micro-batch 8] [--steps 20] [--compiled]

The sides step in turn in two processes on the same GPU, so both must fit at once. transformers runs under bf16 autocast
with fp32 weights and fused AdamW, this project in bf16 with fp32 master weights: both keep fp32 optimizer state.
Memory is what torch's allocator handed out at most. `--compiled` puts torch.compile around the transformers model.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.sides import SHAPES, Side


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="410m")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/train_gpu.py needs a CUDA device, and torch finds none here; see train_cpu.py")
    shape = dataclasses.replace(SHAPES[options.shape], seq=options.seq, micro_batch=options.micro_batch)
    theirs, ours = "compiled" if options.compiled else "transformers", "own"
    sides = [Side(name, shape, "cuda", threads=4) for name in (theirs, ours)]
    results: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(options.warmup + options.steps):
        for side in sides:
            result = side.step(number)
            if number >= options.warmup:
                results[side.name].append(result)
    for side in sides:
        side.close()
    print(f"shape {options.shape}: {shape}; {torch.cuda.get_device_name()}, bf16, {options.steps} steps")
    for name, steps in results.items():
        speed = shape.tokens / statistics.median(step["wall_s"] for step in steps)
        # Multiply-adds of every weight but the embedding's, and of the causal half of attention, forward and backward.
        weights = 12 * shape.layers * shape.hidden**2 + shape.hidden * shape.vocab
        flops = 6 * weights + 6 * shape.layers * shape.hidden * shape.seq
        print(
            f"{name:>13}: {speed:9.0f} tokens/s, {speed * flops / 1e12:6.1f} TFLOP/s, "
            f"peak {steps[-1]['memory_mb']:7.0f} MB, loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}"
        )
    ratio = statistics.median(a["wall_s"] / b["wall_s"] for a, b in zip(results[theirs], results[ours], strict=True))
    memory = results[ours][-1]["memory_mb"] / results[theirs][-1]["memory_mb"]
    print(f"own / {theirs}: {ratio:.2f} x tokens per second, {memory:.2f} x peak memory")


if __name__ == "__main__":
    main()
