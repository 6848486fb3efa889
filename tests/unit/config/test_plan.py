"""The arithmetic of the plan against the real model and against published numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.config.plan import count_parameters, flops_per_token, flops_terms, plan_text
from megatron.config.plan.memory import stage_moments
from megatron.config.plan.parameters import parameters, stage_parameters
from megatron.model.build import build_model
from megatron.model.from_config import model_spec
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from megatron.training.setup import trained_parameters
from tests.unit.config.conftest import TINY
from tests.unit.config.test_plan_flops import LABELS

Tiny = Callable[..., Config]

VARIATIONS = [
    {},
    {"no_weight_tying": True, "pos_emb": "rotary", "rotary_pct": 0.5, "gpt_j_residual": True},
    {"norm": "rmsnorm", "activation": "swiglu", "use_bias_in_mlp": False, "use_bias_in_attn_linear": False},
    {"num_kv_heads": 2, "activation": "geglu", "pos_emb": "none"},
    {"num_kv_heads": 1, "opt_pos_emb_offset": 2, "intermediate_size": 77, "max_position_embeddings": 40},
    {"norm": "scalenorm", "pos_emb": "alibi", "use_bias_in_qkv": False},
    {"norm": "non_parametric_layernorm", "pos_emb": "rpe", "rpe_num_buckets": 8, "gpt_j_residual": True},
    {"head_dim": 12, "no_weight_tying": True, "use_bias_in_head": True, "pos_emb": "sinusoidal", "num_kv_heads": 3},
    {"lora_rank": 3, "lora_targets": ["query_key_value", "mlp"], "num_kv_heads": 2, "activation": "swiglu"},
    {"lora_rank": 2, "freeze_parameters": ["layers.1.*"], "train_parameters": ["head.*"], "no_weight_tying": True},
    {"soft_prompt_tuning": {"num_tokens": 5}, "max_position_embeddings": 40},
    {"soft_prompt_tuning": {"num_tokens": 8}, "max_position_embeddings": 40, "lora_rank": 2, "pos_emb": "rotary"},
    {"use_qk_layernorm": True, "gpt_j_residual": True, "gpt_j_tied": True, "activation": "geglu_tanh"},
    {"task": "sequence_classification", "num_labels": 3, **LABELS},
    {"task": "token_classification", "num_labels": 5, "lora_rank": 2, "no_weight_tying": True, **LABELS},
    {"task": "question_answering", "no_weight_tying": True, "use_bias_in_head": True, **LABELS},
]


@pytest.mark.parametrize("changes", VARIATIONS)
def test_names_and_shapes_are_those_of_the_real_model(tiny: Tiny, changes: dict[str, object]) -> None:
    config = tiny(**changes)
    spec = model_spec(config)
    model = build_model(spec, device="meta")
    trains = trained_parameters(config, spec)
    assert all(parameter.trained == trains(parameter.name) for parameter in parameters(config))
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {parameter.name: parameter.shape for parameter in parameters(config)} == real


@pytest.mark.parametrize(
    ("tp", "kv_heads"), [(1, 2), (2, 1), (2, 2), (2, 6), (3, 1), (3, 3), (3, 6), (6, 1), (6, 2), (6, 3), (6, 6)]
)
def test_a_tensor_rank_holds_what_the_plan_says(tiny: Tiny, tp: int, kv_heads: int) -> None:
    config = tiny(tp, model_parallel_size=tp, num_kv_heads=kv_heads)
    groups = ProcessGroups(Topology(tp_size=tp), tp - 1)
    model = build_model(model_spec(config), groups, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config).per_device


def test_20b() -> None:
    count = count_parameters(load(["configs/20B.yml"], planning=True))
    assert count.unique == 20_554_567_680
    assert count.counted == 20_556_201_984


def test_stages_hold_everything_once(tiny: Tiny) -> None:
    whole = count_parameters(tiny(no_weight_tying=True)).unique
    assert sum(stage_parameters(tiny(3, no_weight_tying=True, pipe_parallel_size=3))) == whole
    tied = tiny(2, pipe_parallel_size=2)
    assert sum(stage_parameters(tied)) == count_parameters(tied).unique + 512 * 48


def test_flops_by_hand(tiny: Tiny) -> None:
    config = tiny(num_kv_heads=2, intermediate_size=100)
    terms = flops_terms(config)
    # 4 layers, H 48, N 6, G 2, D 8, F 100, S 32, V 512
    assert terms == {
        "query_key_value": 4 * 2 * 48 * 80,
        "scores": 4 * 2 * 32 * 48,
        "weighted_values": 4 * 2 * 32 * 48,
        "attention_output": 4 * 2 * 48 * 48,
        "feed_forward": 4 * 4 * 48 * 100,
        "vocabulary": 2 * 48 * 512,
    }
    assert flops_per_token(config) == 3 * sum(terms.values())


def test_flops_are_six_per_matrix_element_and_the_attention() -> None:
    config = load(["configs/20B.yml"], planning=True)
    matrices = sum(p.numel for p in parameters(config) if len(p.shape) == 2 and not p.name.startswith("embedding."))
    assert flops_per_token(config) == 6 * matrices + 12 * 44 * 6144 * 2048


def memory(**changes: object) -> dict[str, int]:
    return moments(**changes)["forward and backward pass"]


def moments(**changes: object) -> dict[str, dict[str, int]]:
    """The components of a single stage at every moment that may be the peak."""
    devices = changes.pop("devices", 1)
    stage = changes.pop("stage", 0)
    config = load([], {**TINY, "optimizer": {"type": "Adam", "params": {"lr": 1e-3}}, **changes}, devices=devices)
    found = stage_moments(config, stage)
    return {moment: {name: int(size) for name, size in components.items()} for moment, components in found.items()}


def test_memory_of_weights_and_states() -> None:
    numel = count_parameters(load([], TINY, devices=1)).unique
    one = moments()["optimizer step"]
    assert one["weights"] == one["gradients"] == one["fp32 master weights"] == 4 * numel
    assert one["optimizer states"] == 8 * numel
    half = moments(precision="fp16", devices=4)["optimizer step"]
    assert half["weights"] == half["gradients"] == 2 * numel
    assert half["optimizer states"] == 8 * numel // 4
    brain = moments(precision="bfloat16", devices=4)["optimizer step"]
    assert brain["gradients"] == 2 * numel + 4 * numel
    assert memory(devices=4, zero_optimization={"stage": 3})["weights"] == numel
    lion = {"type": "Lion", "params": {"lr": 1e-3}}
    assert memory(optimizer=lion)["optimizer states"] == 4 * numel
    offloaded = memory(device="cuda", zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}})
    assert offloaded["optimizer states"] == offloaded["fp32 master weights"] == 0


def test_the_first_forward_pass_has_no_gradients_and_the_second_has() -> None:
    assert memory()["gradients"] == 0
    assert memory(gradient_accumulation_steps=2)["gradients"] == memory()["weights"]
    assert memory(gradient_accumulation_steps=2, devices=2, pipe_parallel_size=2)["gradients"] == 0
    assert memory(gradient_accumulation_steps=3, devices=2, pipe_parallel_size=2)["gradients"] > 0


def test_recomputation_and_division_save_activations() -> None:
    whole = memory()["activations"]
    assert memory(checkpoint_activations=True)["activations"] < whole
    divided = memory(devices=2, model_parallel_size=2)["activations"]
    assert divided < whole
    assert memory(devices=2, model_parallel_size=2, sequence_parallel=True)["activations"] < divided
    assert memory(train_micro_batch_size_per_gpu=3)["activations"] == 3 * whole


def test_kept_activations_by_hand() -> None:
    """4 layers, H 48, F 192, 6 heads, S 32, 4 bytes, learned positions.

    Of a block: 4 H whole, two norms' two numbers, 3 H of q, k, v, the softmax's 6, H of attention, 2 F; then the final
    norm's input and two numbers.
    """
    words = 32 * 4
    attention = words * (3 * 48 + 6)
    block = words * (4 * 48 + 4 + 48 + 2 * 192) + attention
    final = words * (48 + 2)

    def activations(**changes: object) -> int:
        return memory(**changes)["activations"]

    assert activations() == 4 * block + final
    assert activations(checkpoint_activations=True) == 4 * words * 48 + final
    assert activations(checkpoint_activations=True, checkpoint_num_layers=3) == 2 * words * 48 + final
    assert activations(checkpoint_activations=True, checkpoint_num_layers=9) == words * 48 + final
    assert activations(recompute_activations="selective") == 4 * (block - attention) + final
    # On the first of two stages two micro-batches are under way, and their results wait to be sent.
    staged = {"devices": 2, "pipe_parallel_size": 2, "gradient_accumulation_steps": 8}
    assert activations(**staged) == 2 * (2 * block + words * 48)
    assert activations(**staged, recompute_activations="full") == 2 * (2 * words * 48 + words * 48)


def test_kv_heads_that_ranks_share_cost_each_of_them_one_head() -> None:
    """Of 3 ranks, each works with 2 query heads and 1 kv head, whether there are 3 kv heads or 1."""
    assert (
        memory(devices=3, model_parallel_size=3, num_kv_heads=1)["activations"]
        == memory(devices=3, model_parallel_size=3, num_kv_heads=3)["activations"]
    )


def test_the_plan_names_the_main_numbers() -> None:
    text = plan_text(load(["configs/20B.yml"], devices=96))
    for words in (
        "96 processes (given by the launcher) = 4 stages x 12 replicas x 2 tensor ranks",
        "1536 sequences per step = 4 per forward pass x 32 accumulation steps x 12 replicas",
        "20,554,567,680 unique",
        "20,556,201,984 as DeepSpeed counts",
        "3,145,728 tokens per step",
        "471,859,200,000 tokens in all over 150,000 steps",
        "learning rate 0 to 9.7e-05 over 1,500 steps, then cosine to 9.7e-06",
        "50,277 ids are assumed",
    ):
        assert words in text


def test_an_unknown_vocabulary_is_said_clearly() -> None:
    config = load([], {**TINY, "tokenizer_type": "HFTokenizer", "vocab_file": "nowhere/mine.json"}, devices=1)
    with pytest.raises(ConfigError, match=r"nowhere/mine\.json is not there"):
        plan_text(config)
