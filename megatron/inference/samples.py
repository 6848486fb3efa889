"""Prompts in, records out: what `generate.py` reads, shows and writes.

The records have upstream's fields. Invariant: the output file appears whole, after the last sample, or stays as it was.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.common.errors import DataError
from megatron.common.files import atomic_write
from megatron.inference.decode import Completion, DecodeSettings, decode
from megatron.model.build import Transformer
from megatron.tokenizer.base import Tokenizer

NOT_STARTED = "WARNING: text generation did not start; the first token was the end of the document"
OUT_OF_ROOM = "stopped at the model's last position"


def read_prompts(path: str | Path, prompt_end: str) -> list[str]:
    """The prompts of a file, divided by `prompt_end`, stripped, empty ones left out.

    Raises: DataError if the file is missing, is no text, or holds no prompt.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"prompt file {path} does not exist (working directory {Path.cwd()}). Write one prompt per "
            f"{'line' if prompt_end == chr(10) else repr(prompt_end)} into it, or name another with -i."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompt file {path} cannot be read as UTF-8 text: {error}") from error
    prompts = [prompt.strip() for prompt in text.split(prompt_end)]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise DataError(f"prompt file {path} holds no prompt. Write at least one, divided by {prompt_end!r}.")
    return prompts


@dataclass(frozen=True)
class Generator:
    """A model, its tokenizer and how to decode; turns prompts into records.

    Parallel: tensor-parallel ranks hold one together and call it with the same prompts. asked: see `decode`.
    """

    model: Transformer
    tokenizer: Tokenizer
    settings: DecodeSettings
    batch_size: int = 8
    asked: Callable[[], int] = lambda: 0

    def tokenize(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of the prompts; an empty prompt begins a document.

        Raises: DataError for a prompt that leaves no room for a new token.
        """
        begin = [self.tokenizer.eod_id] if self.tokenizer.eod_id is not None else []
        found = [ids or begin for ids in self.tokenizer.encode_batch(list(prompts))]
        spec, limit = self.model.spec, self.model.spec.max_text_positions
        beside = f" - {spec.num_virtual_tokens} of its soft prompt" if spec.soft_prompt else ""
        for number, (prompt, ids) in enumerate(zip(prompts, found, strict=True), start=1):
            if not ids:
                raise DataError("this tokenizer has no end-of-document token to begin from: give a prompt")
            if len(ids) >= limit:
                raise DataError(
                    f"prompt {number} ({prompt[:40]!r}...) has {len(ids)} tokens, and the model has {limit} positions "
                    f"(max_position_embeddings{beside}). Shorten it to fewer than {limit} tokens."
                )
        return found

    def records(
        self,
        prompts: Sequence[str],
        numbers: Sequence[int] | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index into prompts, record) as they are finished. Prompts of like length share a batch.

        numbers: see `decode`. on_text(index, piece of text) hears what is generated as it comes.
        Raises: DataError as `tokenize`, before anything is generated; Stopped, in the middle of a batch.
        """
        ids = self.tokenize(prompts)
        numbers = numbers or range(len(prompts))
        order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            echo = _Echo(self.tokenizer, batch, on_text) if on_text is not None else None
            started = time.perf_counter()
            completions = decode(
                self.model,
                [ids[index] for index in batch],
                self.settings,
                numbers=[numbers[index] for index in batch],
                on_token=echo,
                asked=self.asked,
            )
            duration = (time.perf_counter() - started) / len(batch)
            if echo is not None:
                echo.flush()
            for index, completion in zip(batch, completions, strict=True):
                yield index, self._record(prompts[index], completion, duration)

    def _record(self, prompt: str, completion: Completion, duration_s: float) -> dict[str, Any]:
        length = len(completion.ids)
        message = None
        if not length:
            message = NOT_STARTED
        elif not completion.finished and length < self.settings.max_new_tokens:
            message = OUT_OF_ROOM
        record: dict[str, Any] = {
            "context": prompt,
            "text": self.tokenizer.decode(completion.ids) if length else None,
            "length": length,
            "finished": completion.finished,
            "message": message,
            "duration_seconds": duration_s,
        }
        if self.settings.keep_logits:
            record["logits"] = [row.tolist() for row in completion.logits]
        return record


class _Echo:
    """Gives text out as soon as its bytes are whole: a character of several tokens is held back until its last one."""

    def __init__(self, tokenizer: Tokenizer, indices: Sequence[int], on_text: Callable[[int, str], None]) -> None:
        self.tokenizer, self.indices, self.on_text = tokenizer, indices, on_text
        self.ids: list[list[int]] = [[] for _ in indices]
        self.shown = [0] * len(indices)

    def __call__(self, row: int, token: int) -> None:
        self.ids[row].append(token)
        text = self.tokenizer.decode(self.ids[row])
        if not text.endswith("\ufffd"):
            self._show(row, text)

    def flush(self) -> None:
        """Show what was held back: no more bytes will come."""
        for row, ids in enumerate(self.ids):
            self._show(row, self.tokenizer.decode(ids))

    def _show(self, row: int, text: str) -> None:
        if len(text) > self.shown[row]:
            self.on_text(self.indices[row], text[self.shown[row] :])
            self.shown[row] = len(text)


def require_writable(path: str | Path) -> None:
    """Find out before the work whether its result can be written. Raises: DataError if it surely cannot."""
    path = Path(path)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(
            f"{path} cannot be written: {folder} is no folder to write to, or {path.name} is a folder itself."
        )


def write_records(path: str | Path, records: Sequence[dict[str, Any]]) -> None:
    """Write one JSON object per line. Raises: DataError if the file cannot be written; it is then as it was."""
    try:
        with atomic_write(path) as stream:
            for record in records:
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}. Choose another sample_output_file (-o)."
        ) from error
