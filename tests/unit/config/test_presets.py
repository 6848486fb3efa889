"""Every shipped YAML loads with the real loader, without warnings, and is the model its name says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron.config import load
from megatron.config.plan import count_parameters, plan_text

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


def name_of(path: Path) -> str:
    return str(path.relative_to("configs").with_suffix(""))


def test_every_preset_is_counted() -> None:
    assert {name_of(path) for path in SHIPPED} == {*COUNTS, *OVERLAYS, "quickstart"}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters(name: str) -> None:
    assert count_parameters(load([f"configs/{name}.yml"], planning=True)).unique == COUNTS[name]


@pytest.mark.parametrize("name", [*COUNTS, "quickstart"])
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
