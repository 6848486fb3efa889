"""A checkpoint of any layout becomes the model that was saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.common.errors import CheckpointError
from megatron.inference.decode import DecodeSettings, decode
from megatron.inference.load import load_model
from tests.unit.convert.small_models import save_model, small_model


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_weights_are_those_that_were_saved(tmp_path: Path, tp_size: int) -> None:
    model = small_model()
    loaded = load_model(save_model(tmp_path, model, tp_size=tp_size))
    assert loaded.spec == model.spec
    own = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, own.pop(name)), name
        assert not parameter.requires_grad
    assert not own
    assert not loaded.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_model_computes_in_the_type_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_model()
    loaded = load_model(save_model(tmp_path, model), dtype=dtype)
    (completion,) = decode(loaded, [[3, 4, 5]], DecodeSettings(max_new_tokens=5, keep_logits=True))
    assert len(completion.ids) == 5
    with torch.no_grad():
        hidden = loaded(torch.tensor([[3, 4, 5]]))
        exact = model.logits(model(torch.tensor([[3, 4, 5]])))[0, -1]
    assert hidden.dtype == dtype
    difference = (completion.logits[0] - exact).abs().max() / exact.abs().max()
    assert difference < (0.05 if dtype == torch.bfloat16 else 1e-5)


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="states no model"):
        load_model(save_model(tmp_path / "a", small_model(), model_spec={"num_layers": 3}))
    other = small_model(ffn_size=96).spec.to_dict()
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.mlp\.linear1\.weight .* \(100, 48\), the model's is \(96, 48\)"
    ):
        load_model(save_model(tmp_path / "b", small_model(), model_spec=other))
    with pytest.raises(CheckpointError, match=r"no tensor layers\.3"):
        load_model(save_model(tmp_path / "c", small_model(), model_spec=small_model(num_layers=4).spec.to_dict()))
