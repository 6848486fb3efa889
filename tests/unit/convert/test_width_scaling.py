"""Multipliers folded into weights: the plain model computes what the one under muP did, for transformers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from megatron.common.errors import CheckpointError
from megatron.convert.export import export_checkpoint
from megatron.convert.lora import merged
from megatron.convert.peft_adapter import export_adapter
from megatron.convert.width_scaling import folded
from megatron.inference.load import load_model
from megatron.model.spec import LowRank, WidthScaling
from tests.unit.convert.small_models import save_model, small_model

MUP = WidthScaling(
    18, 40, num_heads=2, num_kv_heads=2, head_dim=9,
    embedding_mult=1.7, position_mult=0.6, attention_temp=0.8, output_temp=0.9,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "fused": {},
    "tied": {"tied_head": True},
    "grouped, normed": {"num_kv_heads": 2, "qk_norm": True, "norm": "rmsnorm", "norm_offset": True},
    "layernormed heads": {"qk_norm": True, "position": "learned", "tied_head": True},
    "scaled embeddings, tied": {"embedding_scale": 18**0.5, "tied_head": True},
    "grouped, alibi, head bias": {"num_kv_heads": 2, "position": "alibi", "head_bias": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_the_plain_model_computes_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = small_model(mup=MUP, **changes)
    plain = load_model(folded(save_model(tmp_path, model)))
    assert plain.spec.mup is None
    assert plain.spec.embedding_scale in (1.0, 48**0.5), "no key gives another one"
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(3))
    expected = model.logits(model(tokens))
    torch.testing.assert_close(plain.logits(plain(tokens)), expected, rtol=1e-4, atol=1e-4)
    without = small_model(**changes)
    assert (without.logits(without(tokens)) - expected).abs().max() > 0.1


def test_transformers_loads_it(tmp_path: Path) -> None:
    model = small_model(mup=MUP, tied_head=True)
    export_checkpoint(folded(save_model(tmp_path, model)), tmp_path / "hf", "fp32", eod_id=0)
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(3))
    theirs = GPTNeoXForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.logits(model(tokens)), rtol=1e-4, atol=1e-4)


def test_a_tie_that_still_holds_is_kept(tmp_path: Path) -> None:
    same = WidthScaling(48, 100, num_heads=4, num_kv_heads=4, head_dim=12)
    model = small_model(mup=same, tied_head=True)
    assert load_model(folded(save_model(tmp_path, model))).spec.tied_head


def test_what_cannot_be_folded(tmp_path: Path) -> None:
    plain = save_model(tmp_path / "plain", small_model())
    assert folded(plain) is plain
    with pytest.raises(CheckpointError, match=r"mup_rp_embedding_mult = 0.6 multiplies sinusoidal positions"):
        folded(save_model(tmp_path / "sines", small_model(mup=MUP, position="sinusoidal")))
    tuned = save_model(tmp_path / "tuned", small_model(mup=MUP, lora=LowRank(2, 2.0, ("dense",))))
    with pytest.raises(CheckpointError, match="trained with use_mup"):
        export_adapter(tuned, tmp_path / "adapter", dtype=torch.float32)
    assert load_model(folded(merged(tuned))).spec.lora is None
