"""Keys of fine-tuning: what is refused and what is said, with the place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.model.from_config import init_ids, model_spec
from megatron.model.spec import SoftPrompt
from megatron.tokenizer.build import make_tokenizer
from tests.unit.config.conftest import TINY

Tiny = Callable[..., Config]
SUM = "soft_prompt_tuning.num_tokens + seq_length"


@pytest.mark.parametrize(
    ("devices", "block", "changes", "message"),
    [
        (1, {"num_tokens": 0}, {}, "soft_prompt_tuning.num_tokens"),
        (1, {"num_tokens": -3}, {}, "soft_prompt_tuning.num_tokens"),
        (1, {"num_tokens": 2.5}, {}, "soft_prompt_tuning.num_tokens"),
        (1, {"init_range": 0}, {}, "soft_prompt_tuning.init_range"),
        (1, {"n_tokens": 4}, {}, "num_tokens"),
        (1, {"init_text": "a"}, {}, "(soft_prompt_tuning): unknown key init_text"),
        # Not set, max_position_embeddings is seq_length.
        (1, {"num_tokens": 4}, {}, f"{SUM} = 4 + 32 = 36 is more than max_position_embeddings = 32"),
        (1, {"num_tokens": 4}, {}, "Use seq_length: 28 or less, or fewer virtual tokens"),
        (1, {}, {"max_position_embeddings": 41}, f"{SUM} = 10 + 32 = 42 is more than max_position_embeddings = 41"),
        (1, {"num_tokens": 99}, {"max_position_embeddings": 64}, "Use less seq_length and fewer virtual tokens"),
        (
            1,
            {"num_tokens": 4},
            {"max_position_embeddings": 31},
            "max_position_embeddings = 31 is below seq_length = 32",
        ),
        (
            2,
            {"num_tokens": 3},
            {"model_parallel_size": 2, "sequence_parallel": True, "max_position_embeddings": 64},
            f"divides {SUM} = 3 + 32 = 35 over model_parallel_size = 2 ranks. Use num_tokens: 4,",
        ),
    ],
)
def test_refused(
    refused: Callable[..., str], devices: int, block: dict[str, object], changes: dict[str, object], message: str
) -> None:
    found = refused(devices, soft_prompt_tuning=block, **changes)
    assert message in found
    assert len(found.split("\n")) == 1, "one mistake, one message"


def test_a_message_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "my.yml"
    path.write_text(
        "num_layers: 1\nhidden_size: 8\nnum_attention_heads: 2\nseq_length: 8\ntokenizer_type: CharLevelTokenizer\n"
        "soft_prompt_tuning:\n  init_string: a\n  num_tokens: 5\n"
    )
    with pytest.raises(ConfigError, match=r"my.yml:8: soft_prompt_tuning.num_tokens \+ seq_length = 5 \+ 8 = 13"):
        load([path], devices=1)


@pytest.mark.parametrize(
    ("block", "changes", "warning"),
    [
        ({"num_tokens": 32}, {}, "num_tokens = 32 with seq_length = 32: most of every sequence is prompt"),
        (
            {"num_tokens": 4, "init_string": "x", "init_range": 0.5},
            {},
            "init_range = 0.5 has no effect beside init_string",
        ),
        ({"num_tokens": 31, "init_string": "x"}, {}, None),
        ({"enabled": False, "num_tokens": 500}, {}, None),
        # 3 + 33 divide over two ranks, and neither does.
        ({"num_tokens": 3}, {"sequence_parallel": True, "model_parallel_size": 2, "seq_length": 33}, None),
    ],
)
def test_accepted(tiny: Tiny, block: dict[str, object], changes: dict[str, object], warning: str | None) -> None:
    config = tiny(2, soft_prompt_tuning=block, max_position_embeddings=64, load="base", finetune=True, **changes)
    assert len(config.warnings) == (warning is not None)
    assert warning is None or warning in config.warnings[0]
    assert config.tuning.num_virtual_tokens == (block["num_tokens"] if block.get("enabled", True) else 0)


def test_a_model_that_has_learnt_nothing_is_said(tiny: Tiny) -> None:
    for changes in ({"lora_rank": 2}, {"soft_prompt_tuning": {"num_tokens": 4}, "max_position_embeddings": 64}):
        (warning,) = tiny(**changes).warnings
        assert f"{next(iter(changes))} without load: all weights stay at their random start" in warning
        assert not tiny(**changes, load="base", finetune=True).warnings
        assert not tiny(**changes, train_parameters=["*"]).warnings
        assert not load([], {**TINY, **changes}, devices=1, inference=True).warnings


def test_the_spec_and_its_start(tiny: Tiny) -> None:
    tokenizer = make_tokenizer("CharLevelTokenizer", "")
    wide = {"max_position_embeddings": 64}
    config = tiny(soft_prompt_tuning={"num_tokens": 5, "init_string": "ab", "enabled": True}, **wide)
    assert model_spec(config).soft_prompt == SoftPrompt(5, 0.5)
    a, b = tokenizer.encode("ab")
    assert init_ids(config, tokenizer) == (a, b, a, b, a)
    longer = tiny(soft_prompt_tuning={"num_tokens": 2, "init_string": "bab"}, **wide)
    assert init_ids(longer, tokenizer) == (b, a)
    for block in (None, {"num_tokens": 3}, {"init_string": "a", "enabled": False}):
        assert init_ids(tiny(soft_prompt_tuning=block, **wide), tokenizer) == ()
    assert model_spec(tiny(soft_prompt_tuning={"enabled": False})) == model_spec(tiny())


def test_a_text_without_tokens(tiny: Tiny) -> None:
    class Silent:
        def encode(self, text: str) -> list[int]:
            return []

    config = tiny(soft_prompt_tuning={"init_string": "\x00"}, max_position_embeddings=64)
    with pytest.raises(ConfigError, match=r"soft_prompt_tuning.init_string = '\\x00' has no token"):
        init_ids(config, Silent())  # type: ignore[arg-type]
