"""What older versions of transformers need: keys under both names, and a word on what they do not compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.convert.export import config_json
from megatron.convert.families import FAMILIES
from megatron.convert.reader_versions import needed_versions
from tests.parity.hf_models import MODELS

# The oldest version that gave the native logits, tried by hand (megatron/convert/reader_versions.py); the rest: 4.40.
NEWER = {
    "llama-3": (4, 43), "llama-yarn": (4, 51), "mistral": (4, 42), "mistral-0.3": (4, 43), "qwen2-window": (4, 57),
    "qwen3": (4, 51), "falcon-11b": (4, 41),
}  # fmt: skip


def exported(name: str) -> dict[str, Any]:
    """config.json of one of the models, as it is written for a given config of transformers 5."""
    model_type, keys = MODELS[name]
    family = FAMILIES[model_type]
    return config_json(family, family.read_model(keys), dtype=torch.bfloat16, ids={"eos_token_id": 2})


@pytest.mark.parametrize("name", MODELS)
def test_the_oldest_version_is_told(name: str) -> None:
    model_type, keys = MODELS[name]
    needs = needed_versions(model_type, FAMILIES[model_type].read_model(keys))
    assert max((version for version, _ in needs), default=(4, 40)) == NEWER.get(name, (4, 40))
    assert needs == sorted(needs, reverse=True)


@pytest.mark.parametrize("name", MODELS)
def test_keys_for_both(name: str) -> None:
    model_type, keys = MODELS[name]
    written = exported(name)
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"
    assert "rope_parameters" in written or model_type in ("gpt2", "gptj", "gpt_bigcode", "opt")
    if "rope_parameters" not in written:
        return
    block, base_key = written["rope_parameters"], "rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"
    assert written[base_key] == block["rope_theta"] == keys.get("rope_parameters", {}).get("rope_theta", 10000.0)
    kind = keys.get("rope_parameters", {}).get("rope_type", "default")
    assert block["rope_type"] == kind
    old = written["rope_scaling"]
    if kind == "default":
        assert old is None
    elif kind == "linear":
        # 4.40 refuses a block of any other keys.
        assert old == {"type": "linear", "factor": block["factor"]}
    else:
        assert old == {key: value for key, value in block.items() if key != "rope_theta"}
    if model_type == "gpt_neox":
        assert written["rotary_pct"] == block["partial_rotary_factor"] == keys.get("rotary_pct", 0.25)
