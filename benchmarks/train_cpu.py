"""Training on a CPU: tokens per CPU-second and peak memory, this project's engine against transformers.

    python benchmarks/train_cpu.py [--shape 14m] [--steps 15] [--threads 1]

Both sides live at once and step in turn, so that a noisy machine disturbs both alike; the ratio is the median over the
pairs. CPU time is that of the whole process, memory the peak resident set since its start, imports included.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.sides import SHAPES, Side


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="14m")
    parser.add_argument("--seq", type=int, help="sequence length (512)")
    parser.add_argument("--micro-batch", type=int, help="sequences per step (4)")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    changes = {"seq": options.seq, "micro_batch": options.micro_batch}
    shape = dataclasses.replace(SHAPES[options.shape], **{key: value for key, value in changes.items() if value})
    sides = [Side(name, shape, "cpu", options.threads) for name in ("transformers", "own")]
    results: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(options.warmup + options.steps):
        for side in sides:
            result = side.step(number)
            if number >= options.warmup:
                results[side.name].append(result)
    for side in sides:
        side.close()
    print(f"shape {options.shape}: {shape}; {options.threads} thread(s), {options.steps} steps after {options.warmup}")
    for name, steps in results.items():
        speed = shape.tokens / statistics.median(step["cpu_s"] for step in steps)
        print(
            f"{name:>13}: {speed:8.0f} tokens/CPU-s, peak {steps[-1]['memory_mb']:6.0f} MB, "
            f"loss {steps[0]['loss']:.3f} -> {steps[-1]['loss']:.3f}"
        )
    theirs, ours = results["transformers"], results["own"]
    ratio = statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in zip(theirs, ours, strict=True))
    memory = ours[-1]["memory_mb"] / theirs[-1]["memory_mb"]
    print(f"own / transformers: {ratio:.2f} x tokens per CPU-second, {memory:.2f} x peak memory")


if __name__ == "__main__":
    main()
