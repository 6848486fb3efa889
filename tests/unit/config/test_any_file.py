"""Whatever stands in a file: it loads, or one ConfigError says why; never another exception."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.common.errors import ConfigError
from megatron.config import load
from megatron.config.former_keys import GONE, RENAMED
from megatron.config.schema import FIELDS
from megatron.config.source import parse_source
from megatron.config.upstream_keys import EVERY_OTHER_KEY
from tests.unit.config.conftest import TINY

KEYS = sorted({*FIELDS, *EVERY_OTHER_KEY, *GONE, *RENAMED})
WORDS = ["", "x", "None", "1e-4", "5e4", "cpu", "adam", "fp16", "bf16", "1,2", "~/x", "${X}", "a:b@c", "true", "-", "/"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 10**6, 10**30, -(10**30)]),
    st.sampled_from([-0.5, 0.0, 0.5, 1.5, 1e-12, 1e300, float("inf"), float("nan")]),
    st.sampled_from(WORDS),
)
INNER_NAMES = [
    "stage",
    "enabled",
    "type",
    "params",
    "lr",
    "betas",
    "device",
    "offload_optimizer",
    "loss_scale",
    "x",
    "1",
]
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER_NAMES), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5), st.booleans())
def test_any_values_of_any_keys(changes: dict[str, Any], inference: bool) -> None:
    with contextlib.suppress(ConfigError):
        config = load([], {**TINY, **changes}, devices=1, inference=inference)
        json.dumps(config.to_upstream_dict())
        with contextlib.suppress(ConfigError):
            config.require_training()


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abk:- \n\t#[]{},'\"&*!|>%@`=;~0.1eE<\x00é", max_size=60))
def test_any_text(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_source("a.yml", text)
