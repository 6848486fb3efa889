"""FLOPs of the plan against torch's own count of a real forward and backward pass, for every architecture switch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import megatron.ops.matmul
from megatron.config import Config
from megatron.config.plan import flops_per_token
from megatron.engine.modules import loss_term
from megatron.model.attention import SelfAttention
from megatron.model.build import build_model
from megatron.model.from_config import model_spec
from megatron.training.setup import trained_parameters

SWITCHES = [
    {},
    {"no_weight_tying": True, "pos_emb": "rotary", "rotary_pct": 0.5, "gpt_j_residual": True},
    {"norm": "rmsnorm", "activation": "swiglu", "use_bias_in_mlp": False, "use_bias_in_attn_linear": False},
    {"num_kv_heads": 2, "activation": "reglu", "pos_emb": "none"},
    {"num_kv_heads": 1, "intermediate_size": 77, "gpt_j_residual": True, "gpt_j_tied": True},
    {"head_dim": 12, "no_weight_tying": True, "use_bias_in_head": True, "pos_emb": "sinusoidal", "num_kv_heads": 3},
    {"norm": "scalenorm", "pos_emb": "alibi", "use_bias_in_qkv": False},
    {"norm": "non_parametric_layernorm", "pos_emb": "rpe", "rpe_num_buckets": 8},
    {"lora_rank": 3, "lora_targets": ["query_key_value", "mlp"], "num_kv_heads": 2, "activation": "swiglu"},
    {"soft_prompt_tuning": {"num_tokens": 8}, "max_position_embeddings": 40, "num_kv_heads": 2},
    {"use_qk_layernorm": True, "sliding_window_width": 5, "activation": "geglu_tanh", "scale_embeddings": True},
    # Frozen: no gradient of their own, and none at all before the first that learns.
    {"lora_rank": 2},
    {"lora_rank": 2, "lora_targets": ["attention"], "lora_dropout": 0.1, "gpt_j_residual": True},
    {"lora_rank": 3, "lora_targets": ["mlp"], "num_kv_heads": 3, "activation": "swiglu", "no_weight_tying": True},
    {"lora_rank": 2, "lora_targets": ["key_value"], "num_kv_heads": 2, "freeze_parameters": ["layers.[01].*"]},
    {"freeze_parameters": ["embedding.*", "layers.[012].*"], "no_weight_tying": True},
    {"train_parameters": ["head.*"], "no_weight_tying": True},
    {"train_parameters": ["layers.2.mlp.linear2.weight"]},
    {"train_parameters": ["layers.1.attention.query.weight"], "num_kv_heads": 2, "pos_emb": "rotary"},
    {"train_parameters": ["layers.1.attention.key_value.bias"], "num_kv_heads": 2, "gpt_j_residual": True},
    {"train_parameters": ["*_norm.weight"], "use_qk_layernorm": True, "num_kv_heads": 2, "gpt_j_tied": True}
    | {"gpt_j_residual": True, "activation": "bilinear"},
    {"train_parameters": ["*.rpe.weight"], "pos_emb": "rpe", "rpe_num_buckets": 8},
]
LABELLED = [
    {"task": "sequence_classification", "num_labels": 3},
    {"task": "token_classification", "num_labels": 5, "no_weight_tying": True, "use_bias_in_head": True},
    {"task": "question_answering", "lora_rank": 2},
]
# What a task asks for beside the model.
LABELS = {"train_label_data_paths": ["l"], "pack_impl": "unpacked"} | {
    f"{part}_data_paths": ["d"] for part in ("train", "valid", "test")
}


def in_place_product(_: object, a: list[int], b: list[int], **kwargs: object) -> int:
    """The one product of ours that torch's table lacks: the head's gradient is added up in place."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("changes", [*SWITCHES, *({**case, **LABELS} for case in LABELLED)])
def test_flops_are_what_torch_counts(
    tiny: Callable[..., Config], changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(**changes)
    # torch counts its own products only; fused attention counts what it computes twice.
    monkeypatch.setattr(megatron.ops.matmul, "prefers_onednn", lambda: False)
    spec = model_spec(config)
    model = build_model(spec, seed=1)
    trains = trained_parameters(config, spec)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.attention.asked = "eager"
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, config.tokenizer.vocab_size, (2, config.model.seq_length + 1), generator=generator)
    labels, mask = tokens[:, 1:], torch.ones(2, config.model.seq_length)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place_product}) as counter:
        hidden = model(tokens[:, :-1])
        # The bias is left out: torch counts the sum that is its gradient as a product.
        loss_term(spec, model.groups, hidden, model.output_weight, None, labels % 2, mask).sum.backward()
    assert counter.get_total_flops() == flops_per_token(config) * labels.numel()
