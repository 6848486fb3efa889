"""The plan of generation and evaluation against the bytes that they really keep alive."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.config import Config, load
from megatron.config.plan import inference_plan_text, inference_plan_values
from megatron.config.plan.inference import GENERATED_TOGETHER, estimate_inference
from megatron.config.plan.report import Hardware
from megatron.evaluation.scoring import Continuation, score_batch
from megatron.inference.decode import DecodeSettings, decode
from megatron.inference.samples import Generator
from megatron.inference.sampling import Sampling
from megatron.model.build import Transformer, build_model
from megatron.model.from_config import model_spec
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from tests.distributed.live_memory import LiveMemory

MODEL: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "seq_length": 96,
    "padded_vocab_size": 512,
    "tokenizer_type": "CharLevelTokenizer",
    "train_micro_batch_size_per_gpu": 4,
    "maximum_tokens": 16,
    "text_gen_type": "input-file",
    "sample_input_file": "prompts.txt",
    "device": "cpu",
}
LLAMA = {
    "pos_emb": "rotary",
    "num_kv_heads": 2,
    "activation": "swiglu",
    "norm": "rmsnorm",
    "intermediate_size": 384,
    "mlp_multiple_of": 384,
}
LARGE_VOCABULARY = {"padded_vocab_size": 9216, "vocab_size": 9200}
VARIATIONS = [
    {},
    LLAMA,
    {"gpt_j_residual": True, "pos_emb": "rotary", "no_weight_tying": True, "precision": "bfloat16"},
    {"recompute": True, "sliding_window_width": 9},
    {**LARGE_VOCABULARY, "precision": "bfloat16", "temperature": 1.0, "top_p": 0.9},
    {"soft_prompt_tuning": {"num_tokens": 24}, "max_position_embeddings": 120},
    {"text_gen_type": "unconditional", "num_samples": 3, "sample_input_file": None, "maximum_tokens": 60},
]
TYPES = {"fp32": torch.float32, "bfloat16": torch.bfloat16}


def configured(changes: dict[str, Any], devices: int = 1) -> Config:
    return load([], {**MODEL, **changes}, devices=devices, inference=True, planning=True)


def loaded(config: Config) -> Transformer:
    model = build_model(model_spec(config), seed=1).to(TYPES[config.precision.precision]).eval()
    return model.requires_grad_(False)


@pytest.mark.parametrize("changes", VARIATIONS)
def test_generation_keeps_what_the_plan_says(changes: dict[str, Any]) -> None:
    config = configured(changes)
    estimate, model, keys = estimate_inference(config, "generate"), loaded(config), config.generation
    prompt = estimate.positions - config.tuning.num_virtual_tokens - keys.maximum_tokens
    settings = DecodeSettings(
        max_new_tokens=keys.maximum_tokens,
        sampling=Sampling(keys.temperature, keys.top_k, keys.top_p),
        use_cache=not keys.recompute,
    )
    with LiveMemory() as memory:
        decode(model, [[1] * prompt] * estimate.rows, settings)
    assert estimate.tensors == pytest.approx(memory.peak, rel=0.1)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.components["weights"] == weights


@pytest.mark.parametrize("changes", VARIATIONS[:6])
def test_evaluation_keeps_what_the_plan_says(changes: dict[str, Any]) -> None:
    config = configured(changes)
    estimate, model = estimate_inference(config, "evaluate"), loaded(config)
    length = estimate.positions - config.tuning.num_virtual_tokens
    rows = [Continuation([1] * (length + 1), length)] * estimate.rows
    with LiveMemory() as memory:
        score_batch(model, rows)
    assert estimate.tensors == pytest.approx(memory.peak, rel=0.1)


def test_a_tensor_rank_holds_its_part() -> None:
    config = configured({**LLAMA, "model_parallel_size": 4}, devices=4)
    real = build_model(model_spec(config), ProcessGroups(Topology(tp_size=4), 1), device="meta")
    estimate = estimate_inference(config, "generate")
    assert estimate.components["weights"] == sum(parameter.nbytes for parameter in real.parameters())
    # Four ranks share two heads: each keeps one, 8 prompts of 96 tokens, 3 layers, keys and values of 16 dimensions.
    assert estimate.components["keys and values"] == 2 * 3 * 8 * 96 * 16 * 4


def test_as_many_prompts_together_as_generation_takes() -> None:
    assert Generator.__dataclass_fields__["batch_size"].default == GENERATED_TOGETHER
    assert estimate_inference(configured({"text_gen_type": "interactive"}), "generate").rows == 1


def test_nothing_of_training_stands_in_it() -> None:
    for purpose in ("generate", "evaluate"):
        text = inference_plan_text(configured({"precision": "fp16"}), purpose)
        assert "optimizer states" not in text
        assert "recompute" not in text
        assert "no optimizer" in text
        assert "a CPU computes in fp32" in text
    assert "tasks that generate text keep keys and values too" in inference_plan_text(configured({}), "evaluate")


def test_what_does_not_fit_and_what_mends_it() -> None:
    config = configured({**LARGE_VOCABULARY, "hidden_size": 1024, "num_layers": 12})
    whole = estimate_inference(config, "generate")
    enough = Hardware(memory_bytes=whole.total - whole.components["weights"] / 3)
    assert "It fits with model_parallel_size: 2." in inference_plan_text(config, "generate", enough)
    assert inference_plan_values(config, "generate", enough)["memory_bytes"]["fits"] is False
    assert "No model_parallel_size makes it fit" in inference_plan_text(config, "generate", Hardware(memory_bytes=4e8))
    assert "fits into 80.00 GB" in inference_plan_text(config, "generate", Hardware(memory_bytes=80e9))
