"""A smallest configuration that is complete, and a way to load variations of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.common.errors import ConfigError
from megatron.config import Config, load

TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "seq_length": 32,
    "tokenizer_type": "CharLevelTokenizer",
}


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """Load the smallest configuration with some keys changed, for one process unless `devices` says otherwise."""

    def build(devices: int | None = 1, **changes: Any) -> Config:
        return load([], {**TINY, **changes}, devices=devices)

    return build


@pytest.fixture
def refused(tiny: Callable[..., Config]) -> Callable[..., str]:
    """The message with which a variation of the smallest configuration is refused."""

    def build(devices: int | None = 1, **changes: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            tiny(devices, **changes)
        return str(caught.value)

    return build


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a configuration file."""

    def build(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return build
