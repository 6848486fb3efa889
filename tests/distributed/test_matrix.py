"""Every cell of the matrix equals one process in fp64; deliberate mistakes do not; the document lists what is run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed.broken import train_with_forgotten_norms, train_with_halved_gradient
from tests.distributed.cells import FACTORS, LAYOUTS, covered, covering, full_cells, is_possible, quick_cells
from tests.distributed.differences import differences
from tests.distributed.layout_cases import Case
from tests.distributed.matrix import DOCUMENT, SECTIONS, Entry, listed, shown_cells, with_table
from tests.distributed.oracle import oracle_run
from tests.distributed.tolerances import FP32, excesses

Ranks = Callable[..., list[Any]]

QUICK = [entry for section in ("quick", "long", "bfloat16", "fp16") for entry in SECTIONS[section]()]


@pytest.mark.parametrize("entry", QUICK, ids=lambda entry: entry.name)
def test_cell_equals_one_process(ranks: Ranks, entry: Entry) -> None:
    assert entry.problems(entry.run(ranks)) == []


@pytest.mark.full
@pytest.mark.parametrize("entry", SECTIONS["full"](), ids=lambda entry: entry.name)
def test_cell_of_the_full_matrix_equals_one_process(ranks: Ranks, entry: Entry) -> None:
    assert entry.problems(entry.run(ranks)) == []


def test_every_factorisation_is_a_layout() -> None:
    sizes = [1, 2, 4]
    expected = {(tp, pp, dp) for tp, pp, dp in itertools.product(sizes, repeat=3) if tp * pp * dp in sizes}
    assert expected < set(LAYOUTS)
    assert {tp * pp * dp for tp, pp, dp in LAYOUTS} == {1, 2, 4, 8}


@pytest.mark.parametrize(("cells", "strength"), [(quick_cells(), 2), (full_cells(), 3)], ids=["pairs", "triples"])
def test_every_possible_combination_is_covered(cells: list[dict[str, Any]], strength: int) -> None:
    """Counted from the whole product, not by the generator's own list."""
    assert all(is_possible(cell) for cell in cells)
    seen = {key for cell in cells for key in covered(cell, strength)}
    decisive = ["layout", "zero", "sp", "partition"]
    free = [name for name in FACTORS if name not in decisive]
    possible: set[Any] = set()
    for values in itertools.product(*(FACTORS[name] for name in decisive)):
        fixed = dict(zip(decisive, values, strict=True))
        if not is_possible(fixed):
            continue
        for names in itertools.combinations(FACTORS, strength):
            choices = [[fixed[name]] if name in fixed else FACTORS[name] for name in names]
            possible |= {tuple(zip(names, chosen, strict=True)) for chosen in itertools.product(*choices)}
    assert len(free) == 9
    assert seen == possible


def test_cells_do_not_change_from_run_to_run() -> None:
    assert covering(2) == covering(2)
    assert len({entry.name for entry in QUICK}) == len(QUICK)


@pytest.mark.parametrize("section", ["quick", "long", "bfloat16", "fp16"])
def test_the_document_lists_the_cells_that_are_run(section: str) -> None:
    assert listed(DOCUMENT.read_text(), section) == shown_cells(section), (
        "write it anew: python -m tests.distributed.matrix --write"
    )


def test_a_table_is_written_between_its_marks() -> None:
    document = "a\n<!-- begin x --><!-- end x -->\nb\n<!-- begin y -->\nold\n<!-- end y -->\n"
    once = with_table(with_table(document, "x", "| 1 |"), "y", "| 2 |")
    assert once == "a\n<!-- begin x -->\n| 1 |\n<!-- end x -->\nb\n<!-- begin y -->\n| 2 |\n<!-- end y -->\n"
    assert with_table(once, "x", "| 1 |") == once
    with pytest.raises(ValueError, match="no marks of section z"):
        with_table(document, "z", "")


def test_a_norm_that_is_not_reduced_is_caught(ranks: Ranks) -> None:
    case = Case(tp=2, sequence_parallel=True, steps=2)
    found = differences(ranks(train_with_forgotten_norms, 2, case), oracle_run(case))
    words = excesses(found, FP32)
    assert any("norm" in word and "exp_avg " in word for word in words), words
    assert found.exp_avg > 1000 * FP32["exp_avg"]


def test_a_replica_whose_gradient_counts_half_is_caught(ranks: Ranks) -> None:
    """Also by the loss-independent quantities alone: Adam hides a scale, the moments and the norm do not."""
    case = Case(dp=2, steps=2)
    found = differences(ranks(train_with_halved_gradient, 2, case), oracle_run(case))
    assert found.exp_avg > 1000 * FP32["exp_avg"]
    assert found.norm > 1000 * FP32["norm"]


def test_a_difference_that_is_not_a_number_is_an_excess() -> None:
    case = Case(steps=1)
    reference = oracle_run(case)
    result = {**reference, "losses": [float("nan")], "fragments": []}
    with pytest.raises(AssertionError, match="other tensors"):
        differences([result], reference)
