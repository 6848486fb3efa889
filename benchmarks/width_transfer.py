"""Does the best learning rate of a narrow model fit a wide one? With muP, and without.

    python benchmarks/width_transfer.py [--widths 32 64 128 256] [--steps 150] [--device cpu]

Byte-level models learn the source of Python's standard library at every learning rate of a grid. Printed are their
losses, the best rate of each width, and what the best rate of the narrowest costs the widest, against its own best.
"""

from __future__ import annotations

import argparse
import math
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from megatron.model.build import build_model
from megatron.model.spec import ModelSpec, WidthScaling
from megatron.model.width_scaling import lr_factor
from megatron.optim.build import build_optimizer
from megatron.optim.parameter_groups import parameter_groups

HEADS, LAYERS, BYTES = 4, 2, 256
WARMUP, LAST = 0.1, 0.2  # parts of the steps: with a rising rate, and whose losses are averaged
TEXT_BYTES = 4_000_000


def main() -> None:
    """Train every model and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0**power for power in range(-10, -3)])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=64)
    parser.add_argument("--attn-temp", type=float, default=0.125, help="mup_attn_temp, tuned on the narrowest")
    parser.add_argument("--output-temp", type=float, default=0.35, help="mup_output_temp, likewise")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = _text().to(options.device)
    for title, uses_mup in (("with muP", True), ("without", False)):
        losses = {
            width: [
                sum(_train(text, options, width, rate, seed, uses_mup) for seed in range(options.seeds)) / options.seeds
                for rate in options.rates
            ]
            for width in options.widths
        }
        _print(title, options.rates, losses)


def _print(title: str, rates: list[float], losses: dict[int, list[float]]) -> None:
    best = {width: min(range(len(rates)), key=column.__getitem__) for width, column in losses.items()}
    print(f"\n{title}: loss (nats per byte) by hidden_size; * the best of a column")
    print(f"{'lr':>10}" + "".join(f"{width:>10}" for width in losses))
    for row, rate in enumerate(rates):
        cells = (f"{column[row]:.4f}{'*' if best[width] == row else ' '}" for width, column in losses.items())
        print(f"{rate:>10.2e}" + "".join(f"{cell:>10}" for cell in cells))
    narrow, wide = min(losses), max(losses)
    moved = math.log2(rates[best[wide]] / rates[best[narrow]])
    cost = losses[wide][best[narrow]] / losses[wide][best[wide]]
    print(f"from {narrow} to {wide} the best rate moves by a factor of 2^{moved:.0f}")
    print(f"loss of {wide} at the best rate of {narrow} / at its own best: {cost:.3f}", flush=True)


def _train(
    text: torch.Tensor, options: argparse.Namespace, width: int, rate: float, seed: int, uses_mup: bool
) -> float:
    """The mean loss of the last steps."""
    base = min(options.widths)
    spec = ModelSpec(
        num_layers=LAYERS, hidden_size=width, num_heads=HEADS, num_kv_heads=HEADS, ffn_size=4 * width,
        vocab_size=BYTES, padded_vocab_size=BYTES, max_positions=options.seq, rotary_dims=width // HEADS // 4 * 2,
        tied_head=False, init_method="small_init", output_init_method="wang_init",
    )  # fmt: skip
    if uses_mup:
        temperatures = {"attention_temp": options.attn_temp, "output_temp": options.output_temp}
        spec = replace(spec, mup=WidthScaling(base, 4 * base, HEADS, HEADS, base // HEADS, **temperatures))
    model = build_model(spec, seed=seed, device=options.device)
    groups = parameter_groups(model.named_parameters(), 0.0, lambda name: lr_factor(name, spec, "adam"))
    optimizer = build_optimizer(groups, "adam", lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(options.steps):
        rise = min(1.0, (step + 1) / (WARMUP * options.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_factor"] * rise * (1.0 - step / options.steps)
        starts = torch.randint(len(text) - options.seq - 1, (options.batch, 1), generator=generator)
        rows = text[(starts + torch.arange(options.seq + 1)).to(text.device)]
        loss = F.cross_entropy(model.logits(model(rows[:, :-1])).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    last = torch.stack(losses[-max(1, round(LAST * options.steps)) :])
    return float(last.mean()) if bool(last.isfinite().all()) else math.inf


def _text() -> torch.Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    content = b"".join(file.read_bytes() for file in files)[:TEXT_BYTES]
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


if __name__ == "__main__":
    main()
