"""The cells of the matrix: which combinations of parallel features are run against the oracle.

Every layout of 1, 2 and 4 ranks and one of 8 is combined with every other feature, and every feature with every other
one, at least once (a pairwise covering array); `full_cells` covers triples instead. Invariant: the list is a function
of this file alone.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from tests.distributed.layout_cases import Case

STEPS = 5

# As large as the gradients' elements (clipped to a norm of 0.5 over 2e4 of them): Adam then neither hides a gradient
# of a wrong scale nor divides rounding noise by itself where the true gradient is 0 (a key's bias on unrotated
# dimensions).
EPS = 1e-3

# (tp, pp, dp): every factorisation of 1, 2 and 4, and one of 8.
LAYOUTS = [
    (tp, pp, world // (tp * pp))
    for world in (1, 2, 4)
    for tp in range(1, world + 1)
    if world % tp == 0
    for pp in range(1, world // tp + 1)
    if world // tp % pp == 0
] + [(2, 2, 2)]

FACTORS: dict[str, list[Any]] = {
    "layout": LAYOUTS,
    "zero": [1, 2, 3],
    "sp": [False, True],
    "accumulation": [1, 3],
    "micro_batch": [1, 2],
    # 5 layers divide over no number of stages.
    "layers": [4, 5],
    # Of 4 query heads. With tp 4, two or four ranks share a kv head.
    "kv_heads": [4, 2, 1],
    "tied": [False, True],
    "block": ["sequential", "parallel", "parallel_tied", "llama", "learned"],
    # uneven: half of the tokens at random, and the step's first micro-batch has none at all.
    "mask": ["whole", "uneven"],
    "loss": ["micro_batch", "tokens"],
    "recompute": [False, True],
    "partition": ["uniform", "parameters"],
}

BLOCKS: dict[str, dict[str, Any]] = {
    "sequential": {"residual": "sequential"},
    "parallel": {"residual": "parallel"},
    "parallel_tied": {"residual": "parallel_tied"},
    "llama": {
        "residual": "sequential",
        "activation": "swiglu",
        "norm": "rmsnorm",
        "attention_bias": False,
        "mlp_bias": False,
    },
    "learned": {"residual": "sequential", "position": "learned", "rotary_dims": 0},
}

Cell = dict[str, Any]


def is_possible(cell: Cell) -> bool:
    """Whether the framework offers the combination; what it does not is refused when the config is read.

    Of a factor without meaning in a cell (sequence parallelism of one rank, the partition of one stage) only the
    first value counts.
    """
    tp, pp, _dp = cell.get("layout", (None, None, None))
    if pp is not None and pp > 1 and cell.get("zero", 1) > 1:
        return False
    if tp == 1 and cell.get("sp"):
        return False
    return not (pp == 1 and cell.get("partition", "uniform") != "uniform")


def covering(strength: int, seed: int = 0) -> list[Cell]:
    """Cells in which every possible combination of values of any `strength` factors appears. Greedy, deterministic."""
    generator = random.Random(seed)
    open_tuples = dict.fromkeys(_tuples(strength))
    cells = []
    while open_tuples:
        first = next(iter(open_tuples))
        tries = [_complete(dict(first), generator) for _ in range(30)]
        best = max(tries, key=lambda cell: sum(key in open_tuples for key in covered(cell, strength)))
        for key in covered(best, strength):
            open_tuples.pop(key, None)
        cells.append(best)
    return cells


def covered(cell: Cell, strength: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    """The combinations that a cell covers."""
    return itertools.combinations(cell.items(), strength)


def _tuples(strength: int) -> Iterator[tuple[tuple[str, Any], ...]]:
    for names in itertools.combinations(FACTORS, strength):
        for values in itertools.product(*(FACTORS[name] for name in names)):
            key = tuple(zip(names, values, strict=True))
            # A pair may be possible by itself and yet in no whole cell: ZeRO 2 with a partition over stages.
            if _can_complete(dict(key)):
                yield key


def _can_complete(fixed: Cell) -> bool:
    if not is_possible(fixed):
        return False
    decisive = [name for name in ("layout", "zero", "sp", "partition") if name not in fixed]
    choices = itertools.product(*(FACTORS[name] for name in decisive))
    return any(is_possible({**fixed, **dict(zip(decisive, values, strict=True))}) for values in choices)


def _complete(fixed: Cell, generator: random.Random) -> Cell:
    while True:
        cell = {name: fixed.get(name, generator.choice(values)) for name, values in FACTORS.items()}
        if is_possible(cell):
            return cell


def cell_case(cell: Cell, *, steps: int = STEPS, precision: str = "fp32") -> Case:
    """What runs. Odd sizes throughout: 91 words padded to 92, heads of 6, 11 tokens (12 where they are divided)."""
    tp, pp, dp = cell["layout"]
    spec = {
        "num_layers": cell["layers"],
        "num_kv_heads": cell["kv_heads"],
        "tied_head": cell["tied"],
        "padded_vocab_size": 92,
        "ffn_size": 44,
        **BLOCKS[cell["block"]],
    }
    return Case(
        tp=tp,
        pp=pp,
        dp=dp,
        zero_stage=cell["zero"],
        sequence_parallel=cell["sp"],
        global_batch=cell["micro_batch"] * cell["accumulation"] * dp,
        micro_batch=cell["micro_batch"],
        steps=steps,
        precision=precision,
        normalization=cell["loss"],
        recompute=cell["recompute"],
        is_masked=cell["mask"] == "uneven",
        seq_length=12 if cell["sp"] else 11,
        partition_method=cell["partition"],
        eps=EPS,
        spec=spec,
    )


def cell_name(cell: Cell) -> str:
    """A short name that tells the cell apart from all others."""
    tp, pp, dp = cell["layout"]
    parts = [f"tp{tp}-pp{pp}-dp{dp}", f"zero{cell['zero']}"]
    parts += [word for word in ("sp", "tied", "recompute") if cell[word]]
    parts += [
        f"{cell['micro_batch']}x{cell['accumulation']}",
        f"{cell['layers']}layers",
        f"{cell['kv_heads']}kv",
        cell["block"],
        cell["mask"],
        cell["loss"],
        cell["partition"],
    ]
    return "-".join(parts)


def quick_cells() -> list[Cell]:
    """What `make test` runs: all pairs."""
    return sorted(covering(2), key=_order)


def full_cells() -> list[Cell]:
    """What `make test-full` runs on top: all triples."""
    return sorted(covering(3), key=_order)


def layout_cells() -> list[Cell]:
    """One of the quick cells for every layout and ZeRO stage, for the longer runs and the half precisions."""
    chosen: dict[tuple[Any, ...], Cell] = {}
    for cell in quick_cells():
        chosen.setdefault((cell["layout"], cell["zero"]), cell)
    return list(chosen.values())


def _order(cell: Cell) -> tuple[Any, ...]:
    tp, pp, dp = cell["layout"]
    return tp * pp * dp, tp, pp, cell_name(cell)
