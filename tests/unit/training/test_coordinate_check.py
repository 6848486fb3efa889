"""The coordinate check tells models that scale from models that do not; what train.py does in place of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.cli.width_scaling import run_in_place_of_training
from megatron.config import Config, load
from megatron.model.spec import ModelSpec
from megatron.model.width_scaling import UpdateRule
from megatron.optim.build import build_optimizer
from megatron.training.coordinate_check import LOGITS, Movement, measure, widened

SPEC = ModelSpec(
    num_layers=2, hidden_size=24, num_heads=4, num_kv_heads=4, ffn_size=40, vocab_size=91, padded_vocab_size=96,
    max_positions=16, rotary_dims=4, tied_head=False, output_init_method="normal",
)  # fmt: skip
RATES: dict[UpdateRule, float] = {"adam": 0.01, "sgd": 0.3}


def movement(rule: UpdateRule, *, uses_mup: bool) -> Movement:
    return measure(
        [widened(SPEC, head_dim) for head_dim in (8, 24, 72)],
        lambda groups: build_optimizer(groups, rule, lr=RATES[rule]),
        learning_rate=RATES[rule],
        weight_decay=0.1,
        rule=rule,
        uses_mup=uses_mup,
        seed=3,
    )


@pytest.mark.parametrize("rule", RATES)
def test_flat_under_mup_and_growing_without(rule: UpdateRule) -> None:
    flat, growing = (movement(rule, uses_mup=uses_mup) for uses_mup in (True, False))
    assert all(0.4 < flat.growth(layer) < 1.6 for layer in flat.changes), flat.changes
    blocks = [layer for layer in growing.changes if layer.startswith("layers.")]
    assert len(blocks) == 6
    assert all(growing.growth(layer) > 2.5 for layer in [*blocks, LOGITS]), growing.changes


def test_widened_keeps_the_proportions() -> None:
    wide = widened(SPEC, 18)
    assert (wide.hidden_size, wide.ffn_size, wide.head_dim, wide.rotary_dims) == (72, 120, 18, 12)
    assert (wide.num_heads, wide.num_layers) == (4, 2)


def tiny(**changes: Any) -> Config:
    keys = {"num_layers": 1, "hidden_size": 48, "num_attention_heads": 2, "seq_length": 16}
    return load([], {**keys, "tokenizer_type": "CharLevelTokenizer", **changes}, devices=1)


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    file = tmp_path / "shapes" / "base.json"
    keys = {"optimizer": {"type": "Adam", "params": {"lr": 1e-2}}, "log_dir": str(tmp_path), "device": "cpu"}
    assert not run_in_place_of_training(tiny(**keys))
    config = tiny(**keys, use_mup=True, save_base_shapes=True, base_shapes_file=str(file))
    assert run_in_place_of_training(config)
    model = config.model
    assert json.loads(file.read_text()) == {
        "hidden_size": model.hidden_size,
        "ffn_size": model.ffn_size,
        "num_attention_heads": model.num_attention_heads,
        "num_kv_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
    }
    base = tiny(**keys, use_mup=True, base_shapes_file=str(file)).width.mup_base_shapes
    assert base is not None
    assert base.hidden_size == model.hidden_size
    capsys.readouterr()
    assert run_in_place_of_training(tiny(**keys, coord_check=True))
    said = capsys.readouterr().out
    assert "with muP: mean |change|" in said
    assert "without: mean |change|" in said
    heads = model.num_attention_heads
    assert f"hidden_size {', '.join(str(heads * 8 * 2**power) for power in range(4))}" in said
    assert (tmp_path / "coord_check.png").exists() == ("wrote" in said)
