"""Merging low-rank updates: the plain model computes what the updated one did, whatever layout wrote the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import Reader
from megatron.cli.merge_lora import main as merge_lora
from megatron.common.errors import CheckpointError
from megatron.convert.lora import merged
from megatron.inference.load import load_model
from megatron.model.spec import LowRank
from tests.unit.convert.small_models import save_model, small_model

LLAMA: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "num_kv_heads": 2, "mlp_bias": False}


@pytest.mark.parametrize("changes", [{}, LLAMA, {"tied_head": True, "residual": "sequential"}])
def test_merged_weights_compute_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    targets = ("dense", "gate", "key_value", "linear1", "linear2", "query", "query_key_value", "up")
    model = small_model(lora=LowRank(3, 5.0, targets), **changes)
    with torch.no_grad():  # LoRA's second matrix starts at zero: without noise there would be nothing to merge
        for name, parameter in model.named_parameters():
            if name.endswith(".lora.b"):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    reader = save_model(tmp_path / "tuned", model)
    tokens = torch.randint(0, 61, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.logits(model(tokens))
        torch.testing.assert_close(load_model(reader)(tokens), model(tokens), rtol=0, atol=0)
    assert merge_lora(["--input_dir", str(tmp_path / "tuned"), "--output_dir", str(tmp_path / "plain")]) == 0
    plain = load_model(Reader(tmp_path / "plain" / "global_step5"))
    assert plain.spec.lora is None
    with torch.no_grad():
        torch.testing.assert_close(plain.logits(plain(tokens)), expected, rtol=1e-4, atol=1e-4)
        without = small_model(**changes)
        assert (without.logits(without(tokens)) - expected).abs().max() > 0.1
    for name, parameter in plain.named_parameters():  # by the definition, one element at a time
        weights = dict(model.named_parameters())
        a, b = (weights.get(f"{name.removesuffix('.weight')}.lora.{part}") for part in "ab")
        if a is not None and b is not None:
            by_hand = weights[name].double() + 5.0 / 3.0 * torch.einsum("or,ri->oi", b.double(), a.double())
            torch.testing.assert_close(parameter.double(), by_hand, rtol=1e-5, atol=1e-6)


def test_nothing_to_merge(tmp_path: Path) -> None:
    reader = save_model(tmp_path / "plain", small_model())
    assert merged(reader) is reader
    with pytest.raises(CheckpointError, match="nothing to merge"):
        merge_lora(["--input_dir", str(tmp_path / "plain"), "--output_dir", str(tmp_path / "else")])
    assert not (tmp_path / "else").exists()
