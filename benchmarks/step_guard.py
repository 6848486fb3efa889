"""What the decision before the optimizer's step costs: steps with the guard and its policy against DeepSpeed's own.

    python benchmarks/step_guard.py [--ranks 2] [--steps 60] [--hidden 128] [--layers 4] [--stage 1]

Two engines of the same model, on each of `ranks` processes of this machine, take turns step by step; prints the median
wall and CPU seconds per step, and the ratio of the medians. The side without the guard learns its loss from an
all-reduce behind the step, as one must that decides nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron.training.reliability.anomaly import AnomalyOptions, AnomalyPolicy
from tests.distributed.layout_cases import Case, make_engine, rank_batches
from tests.pool import RankPool

_WRAPPED = ("step", "scaled_global_norm", "_get_norm_groups", "_update_scale")


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--stage", type=int, default=1)
    options = parser.parse_args()
    spec = {
        "hidden_size": options.hidden,
        "num_layers": options.layers,
        "ffn_size": 4 * options.hidden,
        "max_positions": 64,
    }
    case = Case(dp=options.ranks, zero_stage=options.stage, spec=spec, seq_length=64, steps=options.steps)
    pool = RankPool()
    try:
        medians = pool.run_ranks(measured, options.ranks, case, timeout=600)[0]
    finally:
        pool.close()
    for name, (wall, cpu) in medians.items():
        print(f"{name:8s} {wall * 1e3:8.2f} ms a step   {cpu * 1e3:8.2f} ms of one CPU")
    (guarded, guarded_cpu), (bare, bare_cpu) = medians["guarded"], medians["bare"]
    print(f"guarded / bare: {guarded / bare:.3f} in time, {guarded_cpu / bare_cpu:.3f} in CPU time")


def measured(case: Case) -> dict[str, tuple[float, float]]:
    """Median (wall, CPU) seconds of a step, by side. Runs on every rank."""
    guarded, bare = make_engine(case), make_engine(case)
    for name in _WRAPPED:
        bare.deepspeed.optimizer.__dict__.pop(name, None)
    policy = AnomalyPolicy(AnomalyOptions(loss_factor=10.0, grad_norm_factor=100.0))
    spent: dict[str, list[tuple[float, float]]] = {"guarded": [], "bare": []}
    for step in range(case.steps):
        batches = rank_batches(step, case, guarded.groups.dp_rank)
        for name in ("guarded", "bare") if step % 2 else ("bare", "guarded"):
            wall, cpu = time.perf_counter(), time.process_time()
            if name == "guarded":
                guarded.stream.capture()
                result = guarded.train_step(batches, 1e-4, policy.accepts)
                policy.record(step + 1, result.loss, result.grad_norm, is_skipped=result.is_skipped)
                policy.state()
            else:
                _bare_step(bare, batches)
            if step >= 5:
                spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: tuple(statistics.median(column) for column in zip(*rows, strict=True)) for name, rows in spent.items()
    }  # type: ignore[misc]


def _bare_step(engine: Any, batches: Any) -> tuple[float, float]:
    for group in engine.deepspeed.optimizer.param_groups:
        group["lr"] = 1e-4
    engine._compute(batches)
    return float(engine._mean(engine.micro_batch_losses())), float(engine.deepspeed.get_global_grad_norm())


if __name__ == "__main__":
    # By its own name, under which the ranks can import `measured`.
    from benchmarks.step_guard import main as run

    run()
