"""Run the matrix and keep its table in docs/parallel_equivalence.md.

    python -m tests.distributed.matrix            print the table of the quick cells
    python -m tests.distributed.matrix --full     print the table of all triples
    python -m tests.distributed.matrix --write    write the tables of the quick cells into the document

Invariant: what is written between the document's marks comes from a run, and from nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tests.distributed.cells import STEPS, Cell, cell_case, cell_name, full_cells, layout_cells, quick_cells
from tests.distributed.differences import Differences, Ranks, run_and_compare
from tests.distributed.layout_cases import Case
from tests.distributed.oracle import oracle_run
from tests.distributed.tolerances import FP32, FP32_LONG_LOSS, HALF, excesses
from tests.pool import RankFailure, RankPool

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "parallel_equivalence.md"
LONG_STEPS = 20
SEEDS = (3, 4, 5, 6)
_HEADER = {
    "layout": "tp x pp x dp",
    "zero": "ZeRO",
    "sp": "SP",
    "accumulation": "acc.",
    "micro_batch": "mbs",
    "layers": "layers",
    "kv_heads": "kv",
    "tied": "tied",
    "block": "block",
    "mask": "mask",
    "loss": "loss mean",
    "recompute": "recomp.",
    "partition": "partition",
}


@dataclass(frozen=True)
class Entry:
    """One run of the matrix: a cell, for how many steps, in which precision."""

    cell: tuple[tuple[str, Any], ...]
    steps: int = STEPS
    precision: str = "fp32"

    @property
    def case(self) -> Case:
        """What runs."""
        return cell_case(dict(self.cell), steps=self.steps, precision=self.precision)

    @property
    def name(self) -> str:
        """A name that no other entry has."""
        return f"{self.precision}-{self.steps}-{cell_name(dict(self.cell))}"

    @property
    def spread(self) -> float:
        """What the loss may differ by in bf16 and fp16."""
        return seed_spread(self.cell, self.steps)

    def problems(self, found: Differences) -> list[str]:
        """What is wrong with a run of the entry; empty if nothing is."""
        if self.precision == "fp32":
            bounds = FP32 if self.steps == STEPS else {**FP32, "loss": FP32_LONG_LOSS}
            return excesses(found, bounds)
        words = excesses(found, HALF[self.precision])
        if not found.loss <= self.spread:
            words.append(f"loss is off by {found.loss:.2g}, more than the spread of seeds, {self.spread:.2g}")
        return words

    def run(self, ranks: Ranks) -> Differences:
        """Train on ranks, and compare with the oracle."""
        return run_and_compare(ranks, self.case, oracle_run(self.case))


def entries(cells: Iterable[Cell], *, steps: int = STEPS, precision: str = "fp32") -> list[Entry]:
    """Entries of these cells."""
    return [Entry(tuple(cell.items()), steps, precision) for cell in cells]


SECTIONS: dict[str, Callable[[], list[Entry]]] = {
    "quick": lambda: entries(quick_cells()),
    "long": lambda: entries(layout_cells(), steps=LONG_STEPS),
    "bfloat16": lambda: entries(layout_cells(), steps=LONG_STEPS, precision="bfloat16"),
    "fp16": lambda: entries(layout_cells(), steps=LONG_STEPS, precision="fp16"),
    "full": lambda: entries(full_cells()),
}


@cache
def seed_spread(cell: tuple[tuple[str, Any], ...], steps: int) -> float:
    """The least standard deviation over four seeds, over all steps, of the oracle's loss, relative to the loss."""
    case = cell_case(dict(cell), steps=steps)
    curves = [oracle_run(replace(case, seed=seed))["losses"] for seed in SEEDS]
    return min(statistics.stdev(losses) / statistics.mean(losses) for losses in zip(*curves, strict=True))


def row(entry: Entry, found: Differences) -> str:
    """One line of a table."""
    cell = dict(entry.cell)
    shown = [_shown(name, cell[name]) for name in _HEADER]
    numbers = [f"{number:.1e}" for number in found.numbers.values()]
    if entry.precision != "fp32":
        numbers = [*numbers[:2], f"{entry.spread:.1e}"]
    return "| " + " | ".join([*shown, *numbers]) + " |"


def header(precision: str) -> str:
    """The two first lines of a table."""
    numbers = ["loss", "grad norm", "weights", "exp_avg", "exp_avg_sq"]
    if precision != "fp32":
        numbers = ["loss", "grad norm", "seeds"]
    names = [*_HEADER.values(), *numbers]
    return "| " + " | ".join(names) + " |\n|" + "---|" * len(names)


def listed(document: str, section: str) -> list[tuple[str, ...]]:
    """The cells of a table in the document, as they are shown."""
    lines = _between(document, section).strip().splitlines()[2:]
    return [tuple(word.strip() for word in line.strip("|").split("|")[: len(_HEADER)]) for line in lines]


def shown_cells(section: str) -> list[tuple[str, ...]]:
    """The cells of a section as the document must show them."""
    return [tuple(_shown(name, dict(entry.cell)[name]) for name in _HEADER) for entry in SECTIONS[section]()]


def with_table(document: str, section: str, table: str) -> str:
    """The document with this table between the marks of the section."""
    begin, end = f"<!-- begin {section} -->", f"<!-- end {section} -->"
    return document.replace(f"{begin}{_between(document, section)}{end}", f"{begin}\n{table}\n{end}")


def main(argv: list[str] | None = None) -> int:
    """Run, print, write. Returns 1 if a cell is beyond its tolerance; nothing is written then."""
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.matrix", description="Run the matrix.")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {DOCUMENT.name}")
    parser.add_argument("--full", action="store_true", help="all triples instead of all pairs")
    options = parser.parse_args(argv)
    pool, failed = RankPool(), False
    tables: dict[str, str] = {}
    try:
        for section in ["full"] if options.full else ["quick", "long", "bfloat16", "fp16"]:
            lines = []
            for entry in SECTIONS[section]():
                try:
                    found = entry.run(pool.run_ranks)
                except RankFailure as failure:
                    print(f"{entry.name}\n{failure}", flush=True)
                    failed = True
                    continue
                if not lines:
                    lines.append(header(entry.precision))
                    print(f"\n{section}\n{lines[0]}")
                lines.append(row(entry, found))
                print(lines[-1], flush=True)
                for problem in entry.problems(found):
                    print(f"    {problem}", flush=True)
                    failed = True
            tables[section] = "\n".join(lines)
    finally:
        pool.close()
    if options.write and not options.full and not failed:
        text = DOCUMENT.read_text()
        for section, table in tables.items():
            text = with_table(text, section, table)
        DOCUMENT.write_text(text)
        print(f"\nwritten: {DOCUMENT}")
    return int(failed)


def _shown(name: str, value: Any) -> str:
    if name == "layout":
        return " x ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    return str(value)


def _between(document: str, section: str) -> str:
    _, begin, rest = document.partition(f"<!-- begin {section} -->")
    table, end, _ = rest.partition(f"<!-- end {section} -->")
    if not begin or not end:
        raise ValueError(f"{DOCUMENT.name} has no marks of section {section}")
    return table


if __name__ == "__main__":
    sys.exit(main())
