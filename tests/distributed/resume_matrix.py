"""Save at one layout, load at another: which layouts, what runs on their ranks, and the table of the outcome.

The layouts stand in a ring, shuffled once: each trains, saves, and goes on for some steps; the next one loads that
checkpoint into an engine that has moved elsewhere, and makes the same steps. So each is once the source and once the
target. `python -m tests.distributed.resume_matrix --write` runs all and writes docs/resume_matrix.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.data.loader import BatchLoader
from megatron.training.resuming import LoadOptions, load_run
from megatron.training.saving import Position, SaveOptions, save_run
from tests.distributed.layout_cases import SEQ_LENGTH, Case, assemble, fragments, learning_rate, make_engine, tiny_spec

KINDS = ("weight", "exp_avg", "exp_avg_sq")
BEFORE, AFTER = 3, 5
# Of the loss, relative. fp32: two layouts, each within 1e-6 of the exact result (docs/parallel_equivalence.md). Half
# precisions round activations otherwise at every layout, and from one precision to the next.
TOLERANCES = {"fp32": 2e-6, "fp16": 3e-3, "bfloat16": 2e-2}
NUM_SAMPLES = 37  # 8 of them a step: epochs end in the middle of steps
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "resume_matrix.md"
_MARK = "<!-- the table is written by tests/distributed/resume_matrix.py -->\n"


class Samples:
    """A data set of random tokens; a sample is a function of its position."""

    seq_length, has_labels = SEQ_LENGTH, False

    def __len__(self) -> int:
        return NUM_SAMPLES

    def read_into(self, positions: Any, tokens: Any, labels: Any) -> None:
        """Fill the rows of `tokens`."""
        for row, position in enumerate(positions):
            tokens[row] = np.random.default_rng(int(position)).integers(0, tiny_spec().vocab_size, tokens.shape[1])


def case(tp: int, pp: int, dp: int, zero_stage: int, precision: str = "fp32") -> Case:
    """One layout. A tied head, which two stages hold."""
    return Case(
        tp, pp, dp, zero_stage, precision=precision, spec={"tied_head": True, "residual": "sequential"}, eps=1e-3
    )


def name(one: Case) -> str:
    """A short name."""
    precision = "" if one.precision == "fp32" else f" {one.precision}"
    return f"tp {one.tp} pp {one.pp} dp {one.dp} ZeRO {one.zero_stage}{precision}"


def full_ring() -> list[Case]:
    """{tp 1, 2, 4} x {pp 1, 2} x {dp 1, 2, 4} x {ZeRO 0 to 3}, without ZeRO 2 and 3 over stages (refused)."""
    ring = [
        case(tp, pp, dp, zero)
        for tp in (1, 2, 4)
        for pp in (1, 2)
        for dp in (1, 2, 4)
        for zero in ((0, 1, 2, 3) if pp == 1 else (0, 1))
    ]
    random.Random(5).shuffle(ring)
    return ring


def quick_ring() -> list[Case]:
    """What `make test` runs: every axis changes in most transitions."""
    sizes = [(1, 1, 1, 1), (2, 1, 2, 2), (1, 2, 1, 1), (1, 1, 2, 3), (2, 2, 1, 0), (1, 1, 4, 2), (4, 1, 1, 3)]
    return [case(*size) for size in sizes]


def precision_ring() -> list[Case]:
    """All six changes of precision, and a change of layout with each."""
    order = ("fp32", "bfloat16", "fp16", "fp32", "fp16", "bfloat16")
    layouts = [(1, 1, 1, 1), (1, 1, 2, 2), (2, 1, 1, 1), (1, 1, 2, 3), (1, 2, 1, 1), (2, 1, 1, 3)]
    return [case(*layout, precision=precision) for layout, precision in zip(layouts, order, strict=True)]


def save_then_load(one: Case, folder: str, source: str | None) -> dict[str, Any]:
    """On every rank: train, save to `folder`, go on; then load `source`, and go on from there."""
    engine = make_engine(one)
    groups = engine.groups
    samples: Any = Samples()
    loader = BatchLoader(samples, one.micro_batch, one.accumulation, groups.dp_rank, groups.dp_size)

    def train(position: Position, steps: int) -> tuple[list[float], list[list[int]]]:
        losses, order = [], []
        for _ in range(steps):
            batches = loader.step_batches(position.consumed_samples)
            losses.append(engine.train_step(batches, learning_rate(position.step)).loss)
            position.step, position.consumed_samples = position.step + 1, position.consumed_samples + one.global_batch
            order += [batch.sample_ids for batch in batches]
        return losses, order

    position, facts = Position(), {"train data": "samples"}
    train(position, BEFORE)
    saved = fragments(engine)
    save_run(engine, position, SaveOptions(Path(folder), facts=facts))
    losses, _ = train(position, AFTER)
    result = {"saved": saved, "losses": losses, "at": (groups.tp_rank, groups.at.pp_rank, groups.dp_rank)}
    if source is not None:
        position = load_run(engine, LoadOptions(Path(source)), facts, lambda text: None)
        result["loaded"], result["position"] = fragments(engine), (position.step, position.consumed_samples)
        result["losses_then"], result["order"] = train(position, AFTER)
    return result


def global_order(results: list[dict[str, Any]], one: Case) -> list[int]:
    """The samples of all replicas in the order of the run: of each micro-batch one replica after the other."""
    replicas = {r["at"][2]: r["order"] for r in results if r["at"][:2] == (0, 0)}
    assert sorted(replicas) == list(range(one.dp))
    for result in results:
        assert result["order"] == replicas[result["at"][2]], "ranks of one replica read different samples"
    return [
        sample for rows in zip(*(replicas[dp] for dp in range(one.dp)), strict=True) for ids in rows for sample in ids
    ]


def sha(numbers: list[int]) -> str:
    """A short hash of a sequence of numbers."""
    return hashlib.sha256(repr(numbers).encode()).hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One transition. differing: (kind, tensor) that are not bitwise the same; loss: largest relative difference."""

    source: Case
    target: Case
    differing: list[tuple[str, str]]
    loss: float
    order: str
    order_expected: str

    @property
    def tolerance(self) -> float:
        """What the loss may differ by."""
        return max(TOLERANCES[self.source.precision], TOLERANCES[self.target.precision])

    @property
    def is_good(self) -> bool:
        """Whether all is as it must be."""
        return not self.differing and self.loss <= self.tolerance and self.order == self.order_expected


def run_ring(run_ranks: Callable[..., list[Any]], ring: list[Case], folder: Path) -> Iterator[Outcome]:
    """Every transition of the ring, the last layout's to the first included."""
    source = ring[-1]
    before = run_ranks(save_then_load, source.world_size, source, str(folder / "start"), None, timeout=300.0)
    place = folder / "start"
    for number, target in enumerate(ring):
        here = folder / str(number)
        results = run_ranks(save_then_load, target.world_size, target, str(here), str(place), timeout=300.0)
        differing = []
        for kind in KINDS:
            saved, loaded = (
                assemble([{"fragments": result[key]} for result in there], kind)
                for there, key in ((before, "saved"), (results, "loaded"))
            )
            names = sorted({*saved, *loaded})
            differing += [
                (kind, tensor)
                for tensor in names
                if tensor not in saved or tensor not in loaded or not torch.equal(saved[tensor], loaded[tensor])
            ]
        losses = zip(results[0]["losses_then"], before[0]["losses"], strict=True)
        consumed = BEFORE * target.global_batch
        assert {result["position"] for result in results} == {(BEFORE, consumed)}
        expected = [sample % NUM_SAMPLES for sample in range(consumed, consumed + AFTER * target.global_batch)]
        yield Outcome(
            source,
            target,
            differing,
            max(abs(now - then) / abs(then) for now, then in losses),
            sha(global_order(results, target)),
            sha(expected),
        )
        source, before, place = target, results, here


def row(outcome: Outcome) -> str:
    """One line of the table."""
    tensors = "identical" if not outcome.differing else f"{len(outcome.differing)} differ"
    return (
        f"| {name(outcome.source)} | {name(outcome.target)} | {tensors} | {outcome.loss:.1e} | `{outcome.order}` | "
        f"{'yes' if outcome.is_good else 'NO'} |"
    )


def main() -> int:
    """Run both rings; with --write, put the table into the document."""
    from tests.pool import RankPool

    pool, rows, bad = RankPool(), list[str](), 0
    try:
        for ring in (precision_ring(), sorted(full_ring(), key=lambda one: one.world_size > 8)):
            with tempfile.TemporaryDirectory() as folder:
                for outcome in run_ring(pool.run_ranks, ring, Path(folder)):
                    rows.append(row(outcome))
                    bad += not outcome.is_good
                    print(rows[-1], flush=True)
    finally:
        pool.close()
    if "--write" in sys.argv:
        head = DOCUMENT.read_text().split(_MARK)[0]
        columns = "| saved at | loaded at | weights and moments | loss differs by | order of samples | good |"
        DOCUMENT.write_text("\n".join([head + _MARK, columns, "|---|---|---|---|---|---|", *rows]) + "\n")
    return bad


if __name__ == "__main__":
    # Ranks cannot import functions of `__main__`.
    from tests.distributed import resume_matrix

    sys.exit(resume_matrix.main())
