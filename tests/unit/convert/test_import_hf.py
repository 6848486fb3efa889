"""A folder that transformers wrote becomes a native model with the same logits, at any tensor-parallel layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from megatron.common.errors import CheckpointError
from megatron.convert.import_hf import read_spec, read_weights
from megatron.model.build import build_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(2)
    config = GPTNeoXConfig(
        vocab_size=57, hidden_size=40, num_hidden_layers=2, num_attention_heads=5, intermediate_size=96,
        max_position_embeddings=32, initializer_range=0.2, use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_logits_equal(folder: Path) -> None:
    tokens = torch.randint(57, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    spec = read_spec(folder)
    model = build_model(spec).eval()
    weights = dict(read_weights(folder, spec))
    assert set(weights) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
    assert expected.abs().max() > 1
    assert (model.logits(model(tokens)) - expected).abs().max() < 1e-4


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    spec = read_spec(folder)
    save_file(tensors | {"gpt_neox.layers.0.attention.bias": torch.ones(1)}, path)
    list(read_weights(folder, spec))  # a constant buffer of old versions
    save_file(tensors | {"gpt_neox.extra.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"gpt_neox\.extra\.weight"):
        list(read_weights(folder, spec))
    save_file({name: t for name, t in tensors.items() if name != "gpt_neox.final_layer_norm.bias"}, path)
    with pytest.raises(CheckpointError, match=r"no tensor gpt_neox\.final_layer_norm\.bias"):
        list(read_weights(folder, spec))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        list(read_weights(folder, spec))
