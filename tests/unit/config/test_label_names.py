"""label_names: every slip is told with its place, and no rule behind it falls over."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron.common.errors import ConfigError
from megatron.config import load
from tests.meta.source_tree import ROOT

LABELLED = "task: sequence_classification\npack_impl: unpacked\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("label_names: [no, yes]", "must be text. YAML takes yes, no,"),
        ("label_names: yes,no", "must be a list"),
        ("label_names: [a]", "label_names has 1 of the two or more"),
        ("label_names: []", "label_names has 0 of the two or more"),
        ("label_names: [a, a]", "has a more than once"),
        ("label_names: [a, b]\nnum_labels: 3", "label_names are 2, num_labels is 3"),
    ],
)
def test_slips(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "labels.yml"
    file.write_text(LABELLED + line + "\n")
    with pytest.raises(ConfigError) as raised:
        load([ROOT / "configs" / "quickstart.yml", file], planning=True)
    said = [one for one in str(raised.value).splitlines() if one.startswith(f"{file}:3: ")]
    assert said
    assert all(message in one for one in said)


def test_names_give_the_number(tmp_path: Path) -> None:
    file = tmp_path / "labels.yml"
    file.write_text(LABELLED + "label_names: [a, b, c]\n")
    config = load([ROOT / "configs" / "quickstart.yml", file], inference=True)
    assert (config.model.num_labels, config.model.label_names) == (3, ["a", "b", "c"])
