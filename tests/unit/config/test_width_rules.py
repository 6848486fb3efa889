"""muP's keys: the base widths out of their file, and each message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import Config, load
from megatron.model.from_config import model_spec
from tests.unit.config.conftest import TINY

SHAPES = {"hidden_size": 24, "ffn_size": 96, "num_attention_heads": 6, "num_kv_heads": 6, "head_dim": 4}
MADGRAD = {"type": "madgrad_wd", "params": {"lr": 1e-3}}
ON: dict[str, Any] = {"use_mup": True, "mup_base_shapes": SHAPES}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_mup": True}, "use_mup = true needs the widths of the base model, at which the learning rate was found"),
        ({"mup_embedding_mult": 2}, "mup_embedding_mult = 2 needs use_mup: true."),
        ({"save_base_shapes": True}, "save_base_shapes = true needs base_shapes_file"),
        ({"save_base_shapes": True, "coord_check": True, "base_shapes_file": "x"}, "both end the run. Remove one"),
        ({"use_mup": True, "base_shapes_file": "nowhere.json"}, "base_shapes_file = nowhere.json is not there."),
        ({**ON, "base_shapes_file": "x.json"}, "are both set. Keep one of the two."),
        ({"mup_attn_temp": 0.5}, "mup_attn_temp = 0.5 needs use_mup: true."),
        ({**ON, "mup_output_temp": 0}, "mup_output_temp"),
        ({**ON, "optimizer": MADGRAD}, "madgrad_wd has no rule of learning rates under muP (use_mup, "),
        ({"coord_check": True, "optimizer": MADGRAD}, "under muP (coord_check, "),
        ({**ON, "init_method": "orthogonal"}, "init_method = orthogonal does not scale with the width as muP"),
        ({"mup_width_scale": 17}, "mup_width_scale"),
        ({"use_mup": True, "mup_base_shapes": {"hidden_size": 24}}, "mup_base_shapes needs ffn_size. Add it."),
    ],
)
def test_refused(refused: Callable[..., str], changes: dict[str, Any], message: str) -> None:
    assert message in refused(**changes)


@pytest.mark.parametrize("content", ["\x80\x04pickle", "[1]", json.dumps({**SHAPES, "ffn_size": -1}), '{"x": 1}'])
def test_another_file(refused: Callable[..., str], tmp_path: Path, content: str) -> None:
    file = tmp_path / "base.json"
    file.write_text(content, encoding="latin-1")
    assert "is not a JSON object of hidden_size, ffn_size" in refused(use_mup=True, base_shapes_file=str(file))


def test_the_widths_travel_with_the_configuration(tiny: Callable[..., Config], tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    file.write_text(json.dumps(SHAPES))
    config = tiny(use_mup=True, base_shapes_file=str(file))
    config.write(tmp_path / "config.json")
    file.unlink()
    assert Config.read(tmp_path / "config.json").width.mup_base_shapes == config.width.mup_base_shapes
    assert config.width.mup_base_shapes == tiny(**ON).width.mup_base_shapes
    assert config.origin("mup_base_shapes") == "derived from base_shapes_file"


def test_generation_needs_no_file() -> None:
    """It has the widths from the checkpoint."""
    keys = {**TINY, "use_mup": True, "base_shapes_file": "long gone.json"}
    assert load([], keys, devices=1, inference=True).width.mup_base_shapes is None


def test_scaled_embeddings_have_the_base_models_scale(tiny: Callable[..., Config]) -> None:
    config = tiny(**ON, scale_embeddings=True)
    assert model_spec(config).embedding_scale == 24**0.5
    assert model_spec(tiny(scale_embeddings=True)).embedding_scale == config.model.hidden_size**0.5
