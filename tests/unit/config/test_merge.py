"""Several files and the command line into one mapping: nothing is set twice in silence, every place is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.common.errors import ConfigError
from megatron.config import load
from megatron.config.merge import Merged, Setting
from megatron.config.source import parse_source
from megatron.launch.arguments import Parser, add_flags, overrides_of

Write = Callable[[str, str], Path]
BASE = "num_layers: 4\nhidden_size: 48\nnum_attention_heads: 6\nseq_length: 32\ntokenizer_type: CharLevelTokenizer\n"


def settings(*arguments: str) -> dict[str, Any]:
    parser = Parser()
    add_flags(parser)
    return overrides_of(parser.parse_args(arguments))


def merged(*texts: str) -> Merged:
    result = Merged()
    for index, text in enumerate(texts):
        result.add_source(parse_source(f"{index}.yml", text))
    return result


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (("seed: 1\n", "seed: 1\n"), "1.yml:1: seed is also set in 0.yml:1. Keep one of the two."),
        (("num-layers: 2\n", "\nnum_layers: 3\n"), "1.yml:2: num_layers is also set in 0.yml:1. Keep one of the two."),
        (("gas: 2\n", '{"gradient-accumulation-steps": 2}'), "is also set in 0.yml:1. Keep one of the two."),
        (("seed: null\n", "seed: 3\n"), "1.yml:1: seed is also set in 0.yml:1."),
    ],
)
def test_a_key_in_two_files(texts: tuple[str, str], problem: str) -> None:
    (found,) = merged(*texts).problems
    assert problem in found


def test_a_key_and_its_old_name_in_one_file() -> None:
    (found,) = merged("gas: 2\ngradient_accumulation_steps: 2\n").problems
    assert found == "0.yml:2: gradient_accumulation_steps is also set in 0.yml:1. Keep one of the two."


@given(
    st.dictionaries(st.sampled_from([f"k{i}" for i in range(8)]), st.integers() | st.booleans(), max_size=8),
    st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
def test_dividing_a_file_changes_nothing(content: dict[str, Any], where: list[int]) -> None:
    def text(entries: dict[str, Any]) -> str:
        return "".join(f"{key}: {str(value).lower()}\n" for key, value in entries.items())

    parts: list[dict[str, Any]] = [{}, {}, {}]
    for (key, value), index in zip(content.items(), where, strict=False):
        parts[index][key] = value
    whole, divided = merged(text(content)), merged(*map(text, parts))
    assert divided.values == whole.values == content
    assert not divided.problems


def test_places_inside_blocks_survive_merging_and_overriding() -> None:
    result = merged("fp16:\n  enabled: true\n  loss-scale: 0\n")
    result.override({"fp16.loss_scale": Setting(128, "--set fp16.loss_scale=128")})
    assert result.values == {"fp16": {"enabled": True, "loss_scale": 128}}
    assert result.origins["fp16.enabled"] == "0.yml:2"
    assert result.origins["fp16.loss_scale"] == "--set fp16.loss_scale=128"
    result.override({"fp16": None})
    assert result.values == {"fp16": None}
    assert "fp16.enabled" not in result.origins


def test_overriding_leaves_the_callers_blocks_alone() -> None:
    block = {"type": "Adam", "params": {"lr": 1}}
    result = Merged()
    result.override({"optimizer": block})
    result.override({"optimizer.params.lr": 2, "optimizer.params.eps": 3})
    assert result.values["optimizer"] == {"type": "Adam", "params": {"lr": 2, "eps": 3}}
    assert block == {"type": "Adam", "params": {"lr": 1}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "num_layerz=2"), "--set num_layerz=2: unknown key num_layerz. Did you mean num_layers?"),
        (("--set", "num-layers=x"), '--set num-layers=x: num_layers = "x" must be a whole number.'),
        (("--set", "fp16.enabeld=true"), "--set fp16.enabeld=true: unknown key enabeld in fp16. Did you mean enabled?"),
        (
            ("--set", "optimizer.params.lr=-1"),
            "optimizer.params.lr=-1: optimizer.params.lr = -1 must be above 0.",
        ),
        (("--set", "num_layers.x=2"), "--set num_layers.x=2: num_layers = 4 ("),
        (("--set", "num_layers.x=2"), ":1) is no block that could hold x. Set num_layers itself."),
        (("--set", "optimizer..lr=2"), "--set optimizer..lr=2: an empty name stands between the dots."),
        (("--set", "fp16={enabled: true, enabled: false}"), "`enabled` is set twice"),
        (("--set", "extra_save_iters=[1,2"), "--set extra_save_iters=[1,2: not valid YAML"),
        (("--set", "seed"), "--set seed: write KEY=VALUE"),
        (("--set", "=3"), "--set =3: write KEY=VALUE"),
        (
            ("--set", "seed=1", "--set", "seed=2"),
            "--set seed=2: seed is also set by --set seed=1.",
        ),
        (("--iteration", "5", "--set", "iteration=6"), "iteration is also set by --iteration."),
    ],
)
def test_mistakes_on_the_command_line_are_located_there(write: Write, arguments: tuple[str, ...], message: str) -> None:
    path = write("my.yml", BASE + "optimizer: {type: Adam, params: {lr: 1e-3}}\n")
    with pytest.raises(ConfigError) as caught:
        load([path], settings(*arguments), devices=1)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("@run", "@run"), ("a: b", {"a": "b"}), ("", None), ("1e-4", 1e-4), ("[1, 2]", [1, 2]), ("'7'", "7")],
)
def test_values_of_set_are_yaml(text: str, value: object) -> None:
    assert settings("--set", f"wandb_group={text}")["wandb_group"].value == value


def test_the_ssh_port_in_extra_args_is_the_key(write: Write) -> None:
    config = load([write("my.yml", BASE + "deepspeed_extra_args: {ssh_port: 2222}\n")], devices=1)
    assert config.launcher.ssh_port == 2222
    assert config.deepspeed.deepspeed_extra_args is None


def test_moving_out_of_extra_args_keeps_the_places(write: Write) -> None:
    path = write("my.yml", BASE + "deepspeed_extra_args:\n  comms_logger:\n    enable: true\n")
    with pytest.raises(ConfigError) as caught:
        load([path], devices=1)
    assert str(caught.value) == f"{path}:8: unknown key enable in comms_logger. Did you mean enabled?"
