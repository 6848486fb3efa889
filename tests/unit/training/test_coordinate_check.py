"""The coordinate check tells models that scale from models that do not; what train.py does in place of training."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron.cli.width_scaling import run_in_place_of_training
from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.model.spec import LowRank, ModelSpec, SoftPrompt, WidthScaling
from megatron.model.width_scaling import UpdateRule
from megatron.optim.build import build_optimizer
from megatron.training import coordinate_check
from megatron.training.coordinate_check import LOGITS, Movement, ladder, measure, verdict, widened

SPEC = ModelSpec(
    num_layers=2, hidden_size=24, num_heads=4, num_kv_heads=4, ffn_size=40, vocab_size=91, padded_vocab_size=96,
    max_positions=16, rotary_dims=4, tied_head=False, output_init_method="normal",
)  # fmt: skip
RATES: dict[UpdateRule, float] = {"adam": 0.01, "sgd": 0.3}


def movement(rule: UpdateRule, *, uses_mup: bool, spec: ModelSpec = SPEC, narrowest: int = 8) -> Movement:
    return measure(
        [widened(spec, narrowest * factor) for factor in (1, 3, 9)],
        lambda groups: build_optimizer(groups, rule, lr=RATES[rule]),
        learning_rate=RATES[rule],
        weight_decay=0.1,
        rule=rule,
        uses_mup=uses_mup,
        seeds=(3,),
    )


@pytest.mark.parametrize("rule", RATES)
def test_flat_under_mup_and_growing_without(rule: UpdateRule) -> None:
    flat, growing = (movement(rule, uses_mup=uses_mup) for uses_mup in (True, False))
    assert all(-0.45 < slope < 0.2 for slope in flat.slopes().values()), flat.slopes()
    blocks = [layer for layer in growing.changes if layer.startswith("layers.")]
    assert len(blocks) == 6
    assert all(growing.slope(layer) > 0.4 for layer in [*blocks, LOGITS]), growing.slopes()
    assert verdict(flat, growing)[0]
    is_independent, words = verdict(growing, growing)
    assert not is_independent
    assert words.startswith("NOT INDEPENDENT of the width with muP: change ~ width^p with p from")


def test_low_rank_updates_move_as_far_at_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = LowRank(4, 8.0, ("query_key_value", "dense", "linear1", "linear2"))
    spec = replace(SPEC, lora=updates, init_method="small_init", output_init_method="wang_init")
    blocks = [f"layers.{place}" for place in range(SPEC.num_layers)]
    flat = movement("adam", uses_mup=True, spec=spec, narrowest=16)
    assert flat.changes["embedding.word_embeddings"] == [0.0] * 3
    assert all(abs(flat.slope(layer)) < 0.2 for layer in blocks), flat.slopes()
    monkeypatch.setattr(coordinate_check, "lr_factor", lambda *_: 1.0)
    growing = movement("adam", uses_mup=True, spec=spec, narrowest=16)
    assert all(growing.slope(layer) > 0.3 for layer in blocks), growing.slopes()


def test_slopes_are_exponents() -> None:
    power = Movement([10, 20, 70], 4, {"up": [w**0.7 for w in (10, 20, 70)], "still": [1.0, 0.0, 1.0]})
    assert power.slope("up") == pytest.approx(0.7)
    assert math.isnan(power.slope("still"))


@pytest.mark.parametrize(
    ("with_mup", "without", "expected", "words"),
    [
        (0.0, 0.8, True, r"^INDEPENDENT .* Without, p is up to 0.80 \(x\)\."),
        (0.05, 0.1, True, "But without muP as well"),
        (0.5, 0.8, False, "^NOT INDEPENDENT .* x moves farther in wide models"),
        (-1.0, 0.8, False, "^NOT INDEPENDENT .* x moves less and less"),
        (math.nan, 0.8, False, "^NO VERDICT: x did not move"),
        (0.0, math.nan, True, "leave the range of numbers"),
    ],
)
def test_verdict(with_mup: float, without: float, expected: bool, words: str) -> None:
    sides = [Movement([2, 4, 8], 4, {"x": [width**p for width in (2, 4, 8)]}) for p in (with_mup, without)]
    is_independent, text = verdict(*sides)
    assert is_independent == expected
    assert re.search(words, text)


@pytest.mark.parametrize(
    ("changes", "heads", "kv_heads", "widths"),
    [
        ({}, 4, 4, [96, 192, 384, 768]),
        ({"num_heads": 64, "num_kv_heads": 8, "head_dim": 6, "hidden_size": 384}, 8, 1, [64, 128, 256, 512]),
        ({"num_heads": 14, "num_kv_heads": 2, "head_dim": 6, "hidden_size": 84}, 7, 1, [112, 224, 448, 896]),
        ({"num_heads": 48, "num_kv_heads": 1, "head_dim": 6, "hidden_size": 288}, 8, 1, [64, 128, 256, 512]),
    ],
)
def test_ladder(changes: dict[str, int], heads: int, kv_heads: int, widths: list[int]) -> None:
    spec = replace(
        SPEC, **{"hidden_size": 36, "num_layers": 9, "vocab_size": 5000, "padded_vocab_size": 5056, **changes}
    )  # type: ignore[arg-type]
    updates, prompt = LowRank(2, 2.0, ("dense",)), SoftPrompt(3)
    rungs = ladder(replace(spec, lora=updates, soft_prompt=prompt), 2)
    assert rungs == ladder(spec, 2)
    assert [rung.hidden_size for rung in rungs] == widths
    assert {(r.num_heads, r.num_kv_heads, r.num_layers, r.padded_vocab_size) for r in rungs} == {
        (heads, kv_heads, 4, 1024)
    }
    assert len(ladder(spec, 16)) == 2


def test_the_multipliers_are_checked_too() -> None:
    """A large temperature holds the logits of all widths still."""
    cold = replace(SPEC, mup=WidthScaling(1, 1, 1, 1, 1, output_temp=1000.0))
    keys: Any = {
        "learning_rate": 0.01, "weight_decay": 0.0, "rule": "adam", "uses_mup": True, "seeds": (1,), "steps": 1,
    }  # fmt: skip
    logits = [
        measure([spec, widened(spec, 12)], lambda groups: build_optimizer(groups, "adam", lr=0.01), **keys).changes[
            LOGITS
        ]
        for spec in (SPEC, cold)
    ]
    assert all(b < 0.01 * a for a, b in zip(*logits, strict=True))


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
    written = file.read_bytes()
    assert run_in_place_of_training(config)
    with pytest.raises(ConfigError, match="holds something else than the widths of this model"):
        run_in_place_of_training(tiny(**keys, hidden_size=96, save_base_shapes=True, base_shapes_file=str(file)))
    assert file.read_bytes() == written
    with pytest.raises(ConfigError, match="cannot be written: Is a directory"):
        run_in_place_of_training(tiny(**keys, save_base_shapes=True, base_shapes_file=str(tmp_path)))
    base = tiny(**keys, use_mup=True, base_shapes_file=str(file)).width.mup_base_shapes
    assert base is not None
    assert base.hidden_size == model.hidden_size
    capsys.readouterr()
    assert run_in_place_of_training(tiny(**keys, coord_check=True))
    said = capsys.readouterr().out
    assert "with muP: mean |change|" in said
    assert "without: mean |change|" in said
    assert "hidden_size 64, 128, 256, 512" in said
    record = json.loads((tmp_path / "coord_check.json").read_text())
    assert record["verdict"] in said
    assert record["with_muP"]["hidden_size"] == [64, 128, 256, 512]
    assert len(record["without"]["changes"][LOGITS]) == 4
    assert (tmp_path / "coord_check.png").exists() == ("coord_check.png" in said)
