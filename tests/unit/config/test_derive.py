"""What follows from other keys: precision, ZeRO stage, feed-forward width, vocabulary, update rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.config import layout as layout_module

Tiny = Callable[..., Config]
Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "fp32"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": False}}, "fp32"),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bfloat16"),
        ({"precision": "fp16"}, "fp16"),
        ({"precision": "bfloat16", "bf16": {"enabled": True}}, "bfloat16"),
        ({"precision": "auto"}, "fp32"),
        ({"precision": "auto", "fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": True, "type": "bfloat16"}}, "bfloat16"),
    ],
)
def test_precision(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], expected: str) -> None:
    monkeypatch.setattr(layout_module, "count_gpus", lambda: 0)
    assert tiny(**changes).precision.precision == expected


def test_precision_auto_is_bfloat16_on_a_gpu(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "count_gpus", lambda: 1)
    config = tiny(precision="auto")
    assert config.precision.precision == "bfloat16"
    assert config.precision.bf16 is not None
    assert config.precision.bf16.enabled


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32", "fp16": {"enabled": True}},
        {"precision": "fp16", "bf16": {"enabled": True}},
        {"precision": "bfloat16", "bf16": {"enabled": False}},
        {"fp16": {"enabled": True}, "bf16": {"enabled": True}},
    ],
)
def test_contradicting_precisions_name_both_keys(refused: Refused, changes: dict[str, object]) -> None:
    message = refused(**changes)
    assert all(name in message for name in changes)
    assert len(message.split("\n")) == 1


def test_zero_stage_0_runs_as_1_and_says_so(tiny: Tiny) -> None:
    config = tiny(zero_optimization={"stage": 0})
    assert config.zero.stage == 1
    assert any("stage 0 runs as stage 1" in warning for warning in config.warnings)
    assert tiny().zero.stage == 1
    assert not tiny().warnings
    assert tiny(zero_optimization={"stage": 3}).zero.stage == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 192),
        ({"intermediate_size": 100}, 100),
        ({"intermediate_size": 100, "mlp_multiple_of": 64}, 128),
        ({"expansion_factor": 2.5}, 120),
        # Llama 7B: 2/3 of 32768 is 21845, rounded up to 2 * 256, half of it 10922 rounded up to 256.
        ({"activation": "swiglu", "intermediate_size": 32768, "mlp_multiple_of": 256}, 11008),
        ({"activation": "swiglu", "intermediate_size": 14336, "mlp_multiple_of": 14336}, 14336),
        ({"activation": "geglu"}, 64),
    ],
)
def test_feed_forward_width(tiny: Tiny, changes: dict[str, object], expected: int) -> None:
    assert tiny(**changes).model.ffn_size == expected


def test_gate_and_down_that_do_not_fit_are_refused(refused: Refused) -> None:
    # Upstream's Mistral file: 14336 with mlp_multiple_of 1 gives 9558 columns against 4778 rows.
    message = refused(activation="swiglu", intermediate_size=14336)
    assert "9558" in message
    assert "4778" in message


def test_expansion_factor_and_intermediate_size_exclude_each_other(refused: Refused) -> None:
    assert "both set" in refused(expansion_factor=4, intermediate_size=64)


def test_set_values_are_not_overwritten(tiny: Tiny) -> None:
    config = tiny(num_kv_heads=2, max_position_embeddings=99, padded_vocab_size=600, lr_decay_iters=7, train_iters=9)
    assert config.model.num_kv_heads == 2
    assert config.model.max_position_embeddings == 99
    assert config.tokenizer.padded_vocab_size == 600
    assert config.schedule.lr_decay_iters == 7
    assert tiny(train_iters=9).schedule.lr_decay_iters == 9
    assert tiny(train_iters=10, lr_decay_fraction=0.5).schedule.lr_decay_iters == 5


def test_unset_values_are_derived(tiny: Tiny) -> None:
    config = tiny()
    assert config.model.num_kv_heads == 6
    assert config.model.max_position_embeddings == 32
    assert config.generation.text_gen_type == "unconditional"
    assert tiny(sample_input_file="p.txt").generation.text_gen_type == "input-file"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ["global"] * 4),
        ([[["flash"], 4]], ["flash"] * 4),
        ([[["flash", "global"], "all"]], ["flash", "global"] * 2),
        ([[["global"], 1], [["flash"], "all"]], ["global", "flash", "flash", "flash"]),
        (["flash", "flash", "global", "global"], ["flash", "flash", "global", "global"]),
    ],
)
def test_attention_pattern(tiny: Tiny, given: object, expected: list[str]) -> None:
    assert tiny(attention_config=given).model.attention_config == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[["flash"], 3]], "describes 3 layers and num_layers = 4"),
        ([[["flash"], 3]], 'Write [[["flash"], "all"]].'),
        ([[["flash", "global"], 3]], 'describes 6 layers and num_layers = 4. Write [[["flash", "global"], "all"]].'),
        (["flash", "global"], 'Write [[["flash", "global"], "all"]], or one kind for each layer.'),
        (["flash", "global"] * 3, 'Write ["flash", "global", "flash", "global"], or change num_layers.'),
        ([[["flash"], 10**9]], 'describes 1000000000 layers and num_layers = 4. Write [[["flash"], "all"]].'),
        ([[["flash"], True]], 'attention_config holds [["flash"], true].'),
        ([["flash"], 4], 'for all layers write [[["flash"], "all"]].'),
        ([], "Remove the key for global in all layers."),
        ([[["mamba"], "all"]], "asks for mamba: the layers do not exist here yet. Use global or flash."),
        ([[["local", "global"], "all"]], "asks for local: DeepSpeed's local attention does not exist here. Use global"),
        ([[["bigbird", "sparse_fixed"], "all"]], "asks for bigbird, sparse_fixed: the block-sparse patterns"),
        ([[["gmlp"], "all"]], "asks for gmlp: spatial gating does not exist here"),
        ([[["flsh"], "all"]], "asks for flsh: it is no kind of layer. Did you mean flash?"),
        ([["flash", 4]], "Each entry is a name"),
    ],
)
def test_attention_pattern_that_does_not_fit(refused: Refused, given: object, message: str) -> None:
    assert message in refused(attention_config=given)


def test_norms_of_transformer_engine_are_the_plain_ones(tiny: Tiny) -> None:
    config = tiny(norm="te_rmsnorm")
    assert config.model.norm == "rmsnorm"
    assert any("norm = te_rmsnorm is computed as rmsnorm" in warning for warning in config.warnings)
    assert tiny(norm="te_layernorm").model.norm == "layernorm"


def test_where_layers_of_transformer_engine_differ_upstream(tiny: Tiny) -> None:
    """Facts of upstream: biases always, the norm's epsilon fixed, a gated width that is not scaled by two thirds."""

    def said(**keys: object) -> str:
        return "\n".join(warning for warning in tiny(**keys).warnings if "upstream's layer" in warning)

    assert said(te_mha=True, te_layernorm_mlp=True) == ""
    assert "has biases (for the same: use_bias_in_attn_linear: true)" in said(
        te_mha=True, use_bias_in_attn_linear=False
    )
    gated = {"te_layernorm_mlp": True, "activation": "swiglu", "norm": "te_rmsnorm"}
    text = said(**gated, use_bias_in_mlp=False)
    assert "has biases (for the same: use_bias_in_mlp: true)" in text
    assert "is 192 wide and not 64 (for the same: intermediate_size: 192 with mlp_multiple_of: 192)" in text
    assert "adds 1e-05 in its norm and not 1e-08" in text
    mended = said(**gated, intermediate_size=192, mlp_multiple_of=192, rms_norm_epsilon=1e-5)
    assert mended == ""
    assert said(activation="swiglu", use_bias_in_mlp=False) == ""


def test_vocabulary_is_padded_for_all_tensor_ranks(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 299}}, "added_tokens": [{"id": 300}]}))
    config = tiny(2, tokenizer_type="HFTokenizer", vocab_file=str(path), model_parallel_size=2, hidden_size=48)
    assert (config.tokenizer.vocab_size, config.tokenizer.padded_vocab_size) == (301, 512)


def test_padded_vocabulary_below_the_tokenizers_is_refused(refused: Refused) -> None:
    assert "padded_vocab_size = 400 is below the tokenizer's 512 ids" in refused(padded_vocab_size=400)


def test_optimizer_params_become_typed(tiny: Tiny) -> None:
    config = tiny(optimizer={"type": "Adam", "params": {"lr": "1e-4", "betas": [0.9, 0.95], "weight_decay": 0.3}})
    optimizer = config.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.betas, optimizer.eps) == ("adam", 1e-4, (0.9, 0.95), 1e-8)
    assert optimizer.weight_decay == 0.3
    assert tiny(optimizer={"type": "AdamW"}).optimizer.type == "adam"
    assert tiny(optimizer={"type": "Lion"}).optimizer.betas == (0.9, 0.99)
    assert tiny(optimizer={"type": "SGD", "params": {"lr": 1, "momentum": 0.9}}).optimizer.momentum == 0.9
    assert tiny().optimizer.gradient_clipping == 1.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "none"),
        ({"checkpoint_activations": True}, "full"),
        ({"checkpoint_activations": False}, "none"),
        ({"recompute_activations": "selective"}, "selective"),
        ({"recompute_activations": "full"}, "full"),
        ({"recompute_activations": "none"}, "none"),
        ({"checkpoint_activations": True, "recompute_activations": "selective"}, "selective"),
        ({"checkpoint_activations": False, "recompute_activations": "none"}, "none"),
    ],
)
def test_recomputation(tiny: Tiny, changes: dict[str, object], expected: str) -> None:
    training = tiny(**changes).training
    assert training.recompute == expected
    assert training.checkpoint_activations == (expected != "none")


@pytest.mark.parametrize(("asked", "mode"), [(True, "none"), (False, "selective"), (False, "full")])
def test_contradicting_recomputation_names_both_keys(refused: Refused, asked: bool, mode: str) -> None:
    message = refused(checkpoint_activations=asked, recompute_activations=mode)
    assert f"recompute_activations = {mode} contradicts checkpoint_activations = {str(asked).lower()} " in message
    assert "command line (checkpoint_activations)" in message


def test_groups_without_full_recomputation_have_no_effect(tiny: Tiny) -> None:
    assert "no effect" in tiny(checkpoint_num_layers=2).warnings[0]
    assert "no effect" in tiny(checkpoint_num_layers=2, recompute_activations="selective").warnings[0]
    assert not tiny(checkpoint_num_layers=2, checkpoint_activations=True).warnings
    assert not tiny(checkpoint_num_layers=1).warnings


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lr": 1e-3, "bets": [0.9, 0.95]}, "unknown key bets in optimizer.params of adam. Did you mean betas?"),
        ({"lr": -1}, "optimizer.params.lr = -1 must be above 0."),
        ({"betas": [0.9, 1.5]}, "each must lie in [0, 1)"),
        ({"betas": 3}, "optimizer.params.betas = 3 must be a list."),
        ({"weight_decay": 0.2}, "contradicts weight_decay = 0.1"),
    ],
)
def test_wrong_optimizer_params(refused: Refused, params: dict[str, object], message: str) -> None:
    found = refused(optimizer={"type": "Adam", "params": params}, weight_decay=0.1)
    assert message in found
    assert len(found.split("\n")) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "precision: fp16\nbf16: {enabled: true}\n",
            "my.yml:1: precision = fp16 asks for fp16, and bf16.enabled = true (PATH:2) for bfloat16. Remove one of",
        ),
        (
            "fp16: {enabled: true}\nbf16: {enabled: true}\n",
            "my.yml:2: bf16.enabled = true asks for bfloat16, and fp16.enabled = true (PATH:1) for fp16. Remove one of",
        ),
        (
            "fp16: {enabled: true, type: bfloat16}\nprecision: fp16\n",
            "my.yml:2: precision = fp16 asks for fp16, and fp16.type = bfloat16 (PATH:1) for bfloat16. Remove one of",
        ),
        (
            "precision: bf16\nbf16:\n  enabled: false\n",
            "my.yml:1: precision = bfloat16 contradicts bf16.enabled = false (PATH:3). Remove one of the two.",
        ),
        (
            "precision: fp32\nfp16:\n  fp16: true\n  enabled: true\n",
            "my.yml:1: precision = fp32 asks for fp32, and fp16.enabled = true (PATH:4) for fp16.",
        ),
        (
            "fp16:\n  fp16: false\n  enabled: true\n",
            "my.yml:2: fp16.fp16 = false contradicts fp16.enabled = true (PATH:3). Remove fp16.fp16.",
        ),
        ("fp16: {enabled: true, type: int8}\n", 'my.yml:1: fp16.type = "int8" is not one of fp16, bfloat16.'),
        (
            "deepspeed_extra_args:\n  bf16: {enabled: true}\nprecision: fp16\n",
            "my.yml:3: precision = fp16 asks for fp16, and bf16.enabled = true (PATH:2) for bfloat16.",
        ),
        ("deepspeed_extra_args: {bfloat16: {enabled: true}}\n", "it is the old name of bf16. Use the key bf16."),
    ],
)
def test_contradicting_precisions_name_both_places(write: Callable[[str, str], Path], text: str, message: str) -> None:
    rest = (
        "num_layers: 4\nhidden_size: 48\nnum_attention_heads: 6\nseq_length: 32\ntokenizer_type: CharLevelTokenizer\n"
    )
    path = write("my.yml", text + rest)
    with pytest.raises(ConfigError) as caught:
        load([path], devices=1)
    assert message.replace("PATH", str(path)) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "fp32"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": True}, "precision": "bfloat16"}, "bfloat16"),
        ({"fp16": {"fp16": True, "enabled": True}}, "fp16"),
        ({"fp16": {"type": "bfloat16", "enabled": True}}, "bfloat16"),
        ({"fp16": {"type": "bfloat16", "enabled": True}, "bf16": {"enabled": True}}, "bfloat16"),
        ({"fp16": {"type": "fp16"}, "precision": "half"}, "fp16"),
        ({"deepspeed_extra_args": {"bf16": {"enabled": True}}}, "bfloat16"),
        ({"precision": "float32", "fp16": {"enabled": False}, "bf16": {"enabled": False}}, "fp32"),
        ({"precision": "auto", "device": "cpu"}, "fp32"),
        ({"precision": "auto", "device": "cpu", "bf16": {"enabled": True}}, "bfloat16"),
    ],
)
def test_every_way_of_saying_a_precision(tiny: Tiny, settings: dict[str, object], precision: str) -> None:
    assert tiny(**settings).precision.precision == precision
