"""From the run's configuration to its tokenizer: the one file here that sees a config section."""

from __future__ import annotations

from typing import Protocol

from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import make_tokenizer


class TokenizerSection(Protocol):
    """The keys of `config.tokenizer` that are used here."""

    @property
    def tokenizer_type(self) -> str: ...

    @property
    def vocab_file(self) -> str | None: ...

    @property
    def merge_file(self) -> str | None: ...


def build_tokenizer(section: TokenizerSection) -> Tokenizer:
    """The tokenizer of a run. Raises: DataError as `make_tokenizer` does."""
    return make_tokenizer(section.tokenizer_type, section.vocab_file, section.merge_file)
