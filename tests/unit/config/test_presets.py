"""Every shipped YAML loads with the real loader, without warnings, and is the model its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron.config import load
from megatron.config.plan import count_parameters, plan_text
from megatron.config.plan.parameters import parameters
from megatron.model.build import build_model
from megatron.model.from_config import model_spec

OVERLAYS = {"local_setup", "local_setup_wandb", "text_generation"}
SHIPPED = sorted(path for path in Path("configs").rglob("*.yml"))
V = 50304


def gpt(layers: int, hidden: int, vocabulary: int = V) -> int:
    """Untied head, biases everywhere, rotary: 12 L H^2 + 13 L H + 2 H + 2 V H."""
    return 12 * layers * hidden**2 + 13 * layers * hidden + 2 * hidden + 2 * vocabulary * hidden


COUNTS = {
    "19M": gpt(6, 512),
    "49M": gpt(10, 640),
    "125M": gpt(12, 768),
    "bf16_125M": gpt(12, 768),
    "350M": gpt(24, 1024),
    "760M": gpt(24, 1536),
    "800M": gpt(16, 2048),
    "1-3B": gpt(24, 2048),
    "2-7B": gpt(32, 2560),
    "6-7B": gpt(32, 4096),
    "13B": gpt(40, 5120),
    "20B": 20_554_567_680,
    "175B": gpt(96, 12288),
    "pythia/14M": gpt(6, 128),
    "pythia/31M": gpt(6, 256),
    # Published by Biderman et al. 2023, table 1 and the released checkpoints.
    "pythia/70M": 70_426_624,
    "pythia/160M": 162_322_944,
    "pythia/410M": 405_334_016,
    "pythia/1B": 1_011_781_632,
    "pythia/1-4B": 1_414_647_808,
    "pythia/2-8B": 2_775_208_960,
    "pythia/6-9B": 6_857_302_016,
    "pythia/12B": 11_846_072_320,
}

# As published with the models: without the rows that pad a vocabulary for tensor-parallel ranks.
PUBLISHED = {
    "llama/7B": 6_738_415_616,
    "llama/13B": 13_015_864_320,
    "llama/30B": 32_528_943_616,
    "llama/65B": 65_285_660_672,
    "llama2/7B": 6_738_415_616,
    "llama2/13B": 13_015_864_320,
    "llama2/70B": 68_976_648_192,
    "llama2/codellama_7B": 6_738_546_688,
    "llama2/codellama_34B": 33_743_970_304,
    "llama3/8B": 8_030_261_248,
    "llama3/3-1-8B": 8_030_261_248,
    "llama3/70B": 70_553_706_496,
    "mistral/7B": 7_241_732_096,
    "qwen2/7B": 7_615_616_512,
    "qwen3/8B": 8_190_735_360,
    "gemma/2B": 2_506_172_416,
    "gemma/7B": 8_537_680_896,
    "falcon/7B": 6_921_720_704,
    "falcon/40B": 41_303_293_952,
    "gpt2/124M": 124_439_808,
    "gpt2/1-5B": 1_557_611_200,
    "gptj/6B": 6_050_882_784,
    "bigcode/santacoder": 1_124_886_528,
    "bigcode/starcoder": 15_517_456_384,
    "opt/1-3B": 1_315_758_080,
    "opt/6-7B": 6_658_473_984,
}


def name_of(path: Path) -> str:
    return str(path.relative_to("configs").with_suffix(""))


def test_every_preset_is_counted() -> None:
    assert {name_of(path) for path in SHIPPED} == {*COUNTS, *PUBLISHED, *OVERLAYS, "quickstart"}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    assert count_parameters(load([f"configs/{name}.yml"], planning=True)).unique == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameters(name: str) -> None:
    config = load([f"configs/{name}.yml"], planning=True)
    padding = config.tokenizer.padded_vocab_size - config.tokenizer.vocab_size
    width = config.model.hidden_size * (2 if config.model.no_weight_tying else 1) + config.model.use_bias_in_head
    assert count_parameters(config).unique - padding * width == PUBLISHED[name]


@pytest.mark.parametrize("name", [*COUNTS, *PUBLISHED, "quickstart"])
def test_loads_without_complaint_and_is_ready_to_train_with_data(name: str) -> None:
    overlay = [] if name in ("20B", "quickstart") else ["configs/local_setup.yml"]
    config = load([f"configs/{name}.yml", *overlay], planning=True)
    assert not [warning for warning in config.warnings if "no effect" in warning]
    config.require_training()
    if name != "quickstart":
        assert "Parameters" in plan_text(config)


@pytest.mark.parametrize("overlay", sorted(OVERLAYS))
def test_overlays_go_with_a_model(overlay: str) -> None:
    config = load(["configs/125M.yml", f"configs/{overlay}.yml"], planning=True)
    assert config.origin("save" if overlay.startswith("local") else "temperature").startswith(f"configs/{overlay}.yml:")


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_every_key_has_a_comment(path: Path) -> None:
    lines = path.read_text().split("\n")
    for key in yaml.safe_load("\n".join(lines)):
        line = next(line for line in lines if line.startswith(f"{key}:"))
        if line.rstrip() != f"{key}:":
            assert "#" in line, line


def test_quickstart_is_a_small_neox_on_two_processes() -> None:
    config = load(["configs/quickstart.yml"], {"padded_vocab_size": 4096, "device": "cpu"})
    assert (config.parallel.world_size, config.parallel.data_parallel_size, config.zero.stage) == (2, 2, 1)
    assert 5_000_000 <= count_parameters(config).unique <= 10_000_000
    assert config.precision.precision == "fp32"
    assert config.model.gpt_j_residual
    assert config.model.no_weight_tying
    assert (config.model.init_method, config.model.output_layer_init_method) == ("small_init", "wang_init")


@pytest.mark.parametrize("name", [*COUNTS, "quickstart"])
def test_the_plan_lists_the_parameters_of_the_real_model(name: str) -> None:
    changes = {"padded_vocab_size": 4096, "device": "cpu"} if name == "quickstart" else {}
    config = load([f"configs/{name}.yml"], changes, planning=True)
    model = build_model(model_spec(config), device="meta")
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {parameter.name: parameter.shape for parameter in parameters(config)} == real
    assert count_parameters(config).unique == sum(parameter.numel() for parameter in model.parameters())
