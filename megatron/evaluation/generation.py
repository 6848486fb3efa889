"""Continue prompts for tasks that judge generated text, through megatron.inference.

Invariant: a text goes at most a token past its first stop string; the caller cuts it there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.inference.decode import DecodeSettings, IsDone, decode
from megatron.model.build import Transformer
from megatron.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt as token ids; `number` starts its random stream, the same on whichever rank it is continued."""

    prompt: Sequence[int]
    number: int


@dataclass(frozen=True)
class Requests:
    """Requests that share their settings, and the strings at which a text ends."""

    requests: Sequence[Request]
    settings: DecodeSettings
    stops: tuple[str, ...]


def generate_batch(model: Transformer, tokenizer: Tokenizer, batch: Requests) -> list[str]:
    """One text for each request, without the end-of-document token.

    Parallel: tensor-parallel ranks call it together and get the same texts.
    """
    completions = decode(
        model,
        [request.prompt for request in batch.requests],
        batch.settings,
        numbers=[request.number for request in batch.requests],
        is_done=_stop_rule(tokenizer, batch.stops),
    )
    return [tokenizer.decode(completion.ids) for completion in completions]


def _stop_rule(tokenizer: Tokenizer, stops: Sequence[str]) -> IsDone | None:
    if not stops:
        return None
    # A token is at least a byte, and the first character of a window may be torn: four bytes more than the longest.
    window = max(len(stop.encode()) for stop in stops) + 4

    def is_done(ids: list[int]) -> bool:
        tail = tokenizer.decode(ids[-window:])
        return any(stop in tail for stop in stops)

    return is_done
