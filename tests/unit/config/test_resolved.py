"""A configuration survives its way to another process, cannot be changed, and knows where it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.config.schema import FIELDS

SHIPPED = sorted(str(path) for path in Path("configs").rglob("*.yml") if "local" not in path.name)


@pytest.mark.parametrize("file", [file for file in SHIPPED if "text_generation" not in file])
def test_written_and_read_is_equal(file: str, tmp_path: Path) -> None:
    config = load([file], {"zero_optimization.overlap_comm": True}, planning=True)
    config.write(tmp_path / "c.json")
    again = Config.read(tmp_path / "c.json")
    assert again == config
    assert again.to_upstream_dict() == config.to_upstream_dict()
    block, same = config.zero.zero_optimization, again.zero.zero_optimization
    assert block is not None
    assert same is not None
    assert same.model_dump(exclude_unset=True) == block.model_dump(exclude_unset=True)


def test_sections_are_frozen(tiny: Callable[..., Config]) -> None:
    with pytest.raises(ValidationError):
        tiny().model.num_layers = 3  # type: ignore[misc]


def test_flat_dict_holds_every_key_and_is_json(tiny: Callable[..., Config]) -> None:
    flat = tiny(optimizer={"type": "Adam", "params": {"lr": 0.1}}).to_upstream_dict()
    assert set(flat) == set(FIELDS)
    assert json.loads(json.dumps(flat)) == {**flat, "betas": [0.9, 0.999]}
    assert flat["lr"] == 0.1


def test_replace_changes_only_the_copy(tiny: Callable[..., Config]) -> None:
    config = tiny()
    changed = config.replace(seed=5, num_layers=2)
    assert (changed.training.seed, changed.model.num_layers) == (5, 2)
    assert (config.training.seed, config.model.num_layers) == (1234, 4)


def test_origins(tiny: Callable[..., Config]) -> None:
    config = tiny()
    assert config.origin("num_layers") == "command line (num_layers)"
    assert config.origin("seed") == "default"
    assert config.origin("num_kv_heads") == "derived from num_attention_heads"
    assert config.origin("nonsense") == "not set"


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 99}'])
def test_what_is_no_resolved_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a resolved configuration"):
        Config.read(path)
    with pytest.raises(ConfigError, match="not a resolved configuration"):
        Config.read(tmp_path / "absent.json")
