"""Upstream keys that do nothing here or are not there yet are never ignored in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from megatron.config import Config
from megatron.config.schema import FIELDS
from megatron.config.upstream_keys import EVERY_OTHER_KEY, NO_EFFECT, NOT_YET, NOT_YET_VALUES, REFUSED, SET_BY_PROGRAM


def test_no_key_is_in_two_tables() -> None:
    tables = [set(FIELDS), set(NO_EFFECT), set(REFUSED), set(NOT_YET), set(SET_BY_PROGRAM)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set(FIELDS) >= set(NOT_YET_VALUES)
    assert not set(FIELDS) & EVERY_OTHER_KEY


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return "something else" if value is None or isinstance(value, str | tuple) else value + 1


@pytest.mark.parametrize("name", sorted(NO_EFFECT))
def test_no_effect_is_said_only_where_something_is_asked(tiny: Callable[..., Config], name: str) -> None:
    neutral = NO_EFFECT[name][0]
    assert not tiny(**{name: neutral[0] if isinstance(neutral, tuple) else neutral}).warnings
    warnings = tiny(**{name: another(neutral)}).warnings
    assert len(warnings) == 1
    assert name in warnings[0]
    assert NO_EFFECT[name][1] in warnings[0]


def test_one_warning_for_all_switches_of_one_reason(tiny: Callable[..., Config]) -> None:
    warnings = tiny(rope_fusion=True, layernorm_fusion=True, bias_dropout_fusion=True).warnings
    assert len(warnings) == 1


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_not_yet_is_refused_unless_neutral(tiny: Callable[..., Config], refused: Callable[..., str], name: str) -> None:
    neutral = NOT_YET[name][0][0]
    assert not tiny(**{name: neutral}).warnings
    message = refused(**{name: another(neutral)})
    assert name in message
    assert "not supported yet" in message


def test_a_block_that_is_switched_off_is_neutral(tiny: Callable[..., Config]) -> None:
    assert tiny(curriculum_learning={"enabled": False}, amp={"enabled": False}).parallel.world_size == 1


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_a_reason(tiny: Callable[..., Config], refused: Callable[..., str], name: str) -> None:
    neutral, reason = REFUSED[name]
    assert not tiny(**{name: neutral[0]}).warnings
    assert f"{name} = {str(another(neutral[0])).lower()}" in refused(**{name: another(neutral[0])}).replace('"', "")
    assert reason in refused(**{name: {"enabled": True}})


@pytest.mark.parametrize("name", sorted(SET_BY_PROGRAM))
def test_internal_keys_are_refused(refused: Callable[..., str], name: str) -> None:
    assert f"{name} is worked out by the program" in refused(**{name: 1})
