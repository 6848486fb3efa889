"""The layer list: names, sizes, initial values, and agreement with the plan for every shipped preset."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.common.errors import ConfigError
from megatron.config import load
from megatron.config.plan import count_parameters
from megatron.model.attention import SelfAttention
from megatron.model.build import Transformer, build_model, choose_attention, layer_list
from megatron.model.from_config import model_spec
from megatron.model.spec import ModelSpec, RopeScaling
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.sharding import get_shard_spec
from megatron.parallel.topology import Topology
from tests.distributed.layout_cases import tiny_spec

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# Files without a model of their own (local_setup, text_generation) are meant to be given beside one.
PRESETS = sorted(
    path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yml") if "num_layers" in path.read_text()
)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_with_the_planned_number_of_parameters(preset: str) -> None:
    # The quickstart's tokenizer is made by the quickstart; any vocabulary will do for counting.
    changes = {"tokenizer_type": "CharLevelTokenizer", "vocab_file": None} if preset == "quickstart.yml" else {}
    config = load([CONFIGS / preset], changes, planning=True)
    with torch.device("meta"):
        model = Transformer(model_spec(config), ProcessGroups.single())
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).unique


def test_names_are_public_and_complete() -> None:
    names = {name for name, _ in build_model(tiny_spec(num_layers=1)).named_parameters()}
    block = "layers.0"
    norms = {
        f"{block}.{norm}.{kind}"
        for norm in ("input_layernorm", "post_attention_layernorm")
        for kind in ("weight", "bias")
    }
    matrices = {
        f"{block}.{layer}.{kind}"
        for layer in ("attention.query_key_value", "attention.dense", "mlp.linear1", "mlp.linear2")
        for kind in ("weight", "bias")
    }
    ends = {"embedding.word_embeddings.weight", "final_norm.weight", "final_norm.bias", "head.weight"}
    assert names == norms | matrices | ends


@pytest.mark.parametrize(
    ("changes", "absent", "present"),
    [
        ({"tied_head": True}, "head.weight", None),
        ({"activation": "swiglu"}, "layers.0.mlp.linear1.weight", "layers.0.mlp.gate.weight"),
        ({"norm": "rmsnorm"}, "final_norm.bias", "final_norm.weight"),
        ({"attention_bias": False}, "layers.0.attention.dense.bias", "layers.0.mlp.linear2.bias"),
        ({"mlp_bias": False}, "layers.0.mlp.linear2.bias", "layers.0.attention.dense.bias"),
        ({"residual": "parallel_tied"}, "layers.0.post_attention_layernorm.weight", "layers.0.input_layernorm.weight"),
        ({"position": "learned"}, None, "embedding.position_embeddings.weight"),
    ],
)
def test_switches_add_and_remove_parameters(changes: dict[str, Any], absent: str | None, present: str | None) -> None:
    names = {name for name, _ in build_model(tiny_spec(**changes)).named_parameters()}
    assert absent not in names
    assert present is None or present in names


def test_initial_values_follow_the_methods() -> None:
    spec = tiny_spec(hidden_size=64, ffn_size=256, padded_vocab_size=512, vocab_size=500)
    parameters = dict(build_model(spec, seed=11).named_parameters())
    small, wang = math.sqrt(2 / (5 * 64)), 2 / 4 / math.sqrt(64)
    for name, std in (
        ("embedding.word_embeddings.weight", small),
        ("layers.2.mlp.linear1.weight", small),
        ("layers.2.mlp.linear2.weight", wang),
        ("layers.2.attention.dense.weight", wang),
    ):
        assert float(parameters[name].detach().std()) == pytest.approx(std, rel=0.05), name
    assert torch.all(parameters["final_norm.weight"] == 1)
    assert torch.all(parameters["layers.0.mlp.linear1.bias"] == 0)


def test_unknown_init_method_is_refused() -> None:
    with pytest.raises(ValueError, match="is not one of"):
        build_model(tiny_spec(init_method="magic"), seed=1)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide over 3 ranks"):
        layer_list(tiny_spec(), ProcessGroups(Topology(tp_size=3), 0))


def test_shards_of_all_parameters_make_the_whole() -> None:
    whole = dict(build_model(tiny_spec(), seed=5).named_parameters())
    for rank in range(2):
        groups = ProcessGroups(Topology(tp_size=2), rank)
        for name, shard in build_model(tiny_spec(), groups, seed=5).named_parameters():
            assert torch.equal(shard, get_shard_spec(shard).take(whole[name], rank, 2)), name


def test_dropout_acts_in_training_only() -> None:
    model = build_model(tiny_spec(hidden_dropout=0.5, attention_dropout=0.5), seed=1)
    tokens = torch.arange(8).view(1, 8)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_positions_shift_what_is_computed(position: str) -> None:
    model = build_model(tiny_spec(position=position, rotary_dims=4 if position == "rotary" else 0), seed=1)
    tokens = torch.arange(6).view(1, 6)
    given = model(tokens, torch.arange(6).view(1, 6))
    assert torch.equal(given, model(tokens))
    stretched = model(tokens, torch.arange(0, 12, 2).view(1, 6))
    assert not torch.allclose(stretched, given)


def test_causal() -> None:
    model = build_model(tiny_spec(), seed=1)
    tokens = torch.randint(0, 91, (1, 10), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 6] += 1
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert not torch.allclose(before[:, 6:], after[:, 6:])


def test_there_are_presets() -> None:
    assert {"20B.yml", "quickstart.yml", "pythia/12B.yml"} <= set(PRESETS)


def test_the_asked_attention_backend_is_used_or_refused() -> None:
    model = build_model(tiny_spec(window=3), seed=1)
    tokens = torch.arange(9).view(1, 9)
    plain = model(tokens)
    choose_attention(model, "eager", torch.device("cpu"), torch.float32)
    attention = model.get_submodule("layers.1.attention")
    assert isinstance(attention, SelfAttention)
    torch.testing.assert_close(model(tokens), plain)
    assert [backend.name for backend in attention.attention._chosen.values()][-1] == "eager"
    with pytest.raises(ConfigError, match="attention backend 'flex' cannot serve this model: it does not run on cpu"):
        choose_attention(model, "flex", torch.device("cpu"), torch.float32)
    rpe = build_model(tiny_spec(position="rpe", rotary_dims=0))
    with pytest.raises(ConfigError, match="'flex' cannot serve this model: it has no bias"):
        choose_attention(rpe, "flex", torch.device("cuda"), torch.bfloat16)


def test_a_manifest_from_before_the_switches_means_the_same_model() -> None:
    spec = tiny_spec(attention_bias=False, num_kv_heads=2)
    added = {
        *("head_dim", "norm_offset", "rotary_interleaved", "rope_scaling", "rpe_buckets", "rpe_max_distance"),
        *("qkv_bias", "head_bias", "qk_norm", "window", "window_layers", "embedding_scale"),
    }
    old = {name: value for name, value in spec.to_dict().items() if name not in added}
    assert ModelSpec.from_dict(old) == spec
    assert (spec.head_dim, spec.qkv_bias) == (6, False)
    new = tiny_spec(rope_scaling=RopeScaling("yarn", 2.0, 8), window=3, window_layers=(0, 2), head_dim=8)
    assert ModelSpec.from_dict(json.loads(json.dumps(new.to_dict()))) == new
