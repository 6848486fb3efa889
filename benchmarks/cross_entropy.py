"""Output head and loss alone, forward and backward: the chunked pass against full logits.

    python benchmarks/cross_entropy.py [--tokens 2048] [--hidden 128] [--vocab 50304] [--device cpu] [--dtype float32]

Variants are interleaved; each prints its median time (CPU seconds on a CPU) and its speed against full logits.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.cross_entropy import linear_cross_entropy


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--chunks", type=int, nargs="*", default=[64, 128, 256, 512, 2048])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    kind = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    hidden = torch.randn(options.tokens, options.hidden, **kind).requires_grad_()
    weight = (0.02 * torch.randn(options.vocab, options.hidden, **kind)).requires_grad_()
    labels = torch.randint(0, options.vocab, (options.tokens,), device=options.device)
    ones = torch.ones(options.tokens, device=options.device)

    def full() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    variants: dict[str, Callable[[], Tensor]] = {"full logits": full}
    for rows in options.chunks:
        variants[f"{rows} rows"] = lambda rows=rows: linear_cross_entropy(  # type: ignore[misc]
            hidden, weight, labels, ones, chunk_rows=rows
        )
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds + 1):
        for name, variant in variants.items():
            started = _clock(options.device)
            variant().backward()
            if number:
                seconds[name].append(_clock(options.device) - started)
            hidden.grad = weight.grad = None
    base = statistics.median(seconds["full logits"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:>12}: {1000 * median:8.1f} ms, {base / median:.2f} x")


def _clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
