"""DeepSpeed's blocks are checked as DeepSpeed itself would, without importing it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from megatron.common.errors import ConfigError
from megatron.config import Config
from megatron.config.deepspeed_blocks import PLAIN_BLOCKS, REFUSED, TABLE, table
from megatron.config.schema.execution import Bf16Block, Fp16Block
from megatron.engine import deepspeed_keys

VALUES: list[Any] = [True, 3, 2.5, 5e8, -1, "text", "cpu", [1], {}]


def test_the_table_is_what_the_installed_deepspeed_says() -> None:
    assert TABLE.read_text() == deepspeed_keys.table_text(), "run `make reference`"


def test_every_name_that_is_refused_exists() -> None:
    for dotted in REFUSED:
        known: Any = {"keys": table()["keys"]}
        for part in dotted.split("."):
            assert part in known["keys"], dotted
            known = known["keys"][part]


def test_the_typed_blocks_have_every_name() -> None:
    for name, block in (("fp16", Fp16Block), ("bf16", Bf16Block)):
        assert set(table()["keys"][name]["keys"]) <= set(block.model_fields)


@pytest.mark.parametrize("block", ["comms_logger", "tensorboard", "wandb", "csv_monitor", "zero_optimization"])
def test_what_passes_deepspeed_takes(tiny: Callable[..., Config], block: str) -> None:
    """Every name of a block with values of every kind: where we accept, DeepSpeed's own model accepts."""
    model = deepspeed_keys.MODELS[block]
    passed = refused = 0
    for name in table()["keys"][block]["keys"]:
        for value in VALUES:
            content = {name: value, **({"stage": 3} if block == "zero_optimization" and name != "stage" else {})}
            try:
                config = tiny(**{block: content})
            except ConfigError:
                refused += 1
                continue
            passed += 1
            written = config.value(block)
            dumped = written if isinstance(written, dict) else written.model_dump(exclude_unset=True)
            model(**dumped)
    assert passed >= 5
    assert refused > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"flops_profiler": {"enable": True}},
            "(flops_profiler): unknown key enable in flops_profiler. Did you mean enabled?",
        ),
        ({"flops_profiler": {"profile_step": "x"}}, 'flops_profiler.profile_step = "x" must be a number.'),
        ({"comms_logger": {"enabled": 1}}, "comms_logger.enabled = 1 must be true or false."),
        ({"data_types": {"grad_accum_dtype": "fp8"}}, 'grad_accum_dtype = "fp8" is not one of fp32, float32, bf16,'),
        ({"zero_optimization": {"stage": 1, "overlap_com": True}}, "overlap_com in zero_optimization. Did you mean ov"),
        ({"zero_optimization": {"stage": 1, "mics_shard_size": 2}}, "mics_shard_size: DeepSpeed 0.19.8 no longer has"),
        ({"zero_optimization": {"stage": 1, "zenflow": {}}}, "zero_optimization.zenflow = {}: this engine does not"),
        ({"zero_optimization": {"stage": 1, "sub_group_size": -1}}, "sub_group_size = -1 must be at least 0."),
        ({"fp16": {"loss_scael": 0}}, "unknown key loss_scael in fp16. Did you mean loss_scale"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16_optimizer_states = true: master weights and gradients are"),
        ({"deepspeed_extra_args": {"log_levle": "info"}}, "unknown key log_levle in deepspeed_extra_args: DeepSpeed"),
        ({"deepspeed_extra_args": {"log_levle": "info"}}, "Did you mean log_level?"),
        ({"deepspeed_extra_args": {"optimizer": {}}}, "deepspeed_extra_args.optimizer = {}: the key optimizer says it"),
        ({"deepspeed_extra_args": {"elasticity": {"enabled": True}}}, "no longer has it. A checkpoint goes on at any"),
        ({"deepspeed_extra_args": {"comet": {"api_key": "k"}}}, "a file is no place for a secret."),
        ({"deepspeed_extra_args": {"memory_breakdown": "yes"}}, 'memory_breakdown = "yes" must be true or false.'),
        ({"deepspeed_extra_args": {"num_layers": 2}}, "num_layers has a key of its own. Move it out of the block"),
        (
            {"deepspeed_extra_args": {"comms_logger": {"enabled": True}}, "comms_logger": {"enabled": False}},
            "(deepspeed_extra_args): deepspeed_extra_args.comms_logger is also set by the key comms_logger (command",
        ),
    ],
)
def test_refused(refused: Callable[..., str], changes: dict[str, Any], message: str) -> None:
    assert message in refused(**changes)


def test_what_has_a_key_of_its_own_may_stand_in_the_extra_args(tiny: Callable[..., Config]) -> None:
    """Upstream's documentation has comms_logger there."""
    config = tiny(deepspeed_extra_args={"comms_logger": {"enabled": True}, "log_level": "info", "train_batch_size": 4})
    assert config.deepspeed.comms_logger == {"enabled": True}
    assert config.deepspeed.deepspeed_extra_args == {"log_level": "info"}
    assert config.batch.gradient_accumulation_steps * config.batch.train_micro_batch_size_per_gpu == 4


def test_blocks_that_are_switched_off_pass(tiny: Callable[..., Config]) -> None:
    tiny(deepspeed_extra_args={"autotuning": {"enabled": False}, "elasticity": {"enabled": False}})


def test_every_plain_block_is_in_the_table() -> None:
    assert set(PLAIN_BLOCKS) <= set(json.loads(TABLE.read_text())["keys"])
