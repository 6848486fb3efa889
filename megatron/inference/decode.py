"""From prompts of token ids to completions, a batch at a time.

No text and no files here. Invariant: a prompt's completion does not depend on the prompts beside it (up to rounding),
nor on whether keys and values are cached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from megatron.common.errors import Stopped
from megatron.inference.cache import StaticCache
from megatron.inference.sampling import Sampling
from megatron.model.build import Transformer

IsDone = Callable[[list[int]], bool]


@dataclass(frozen=True)
class DecodeSettings:
    """max_new_tokens: most tokens per prompt; eod_id ends a completion and is not part of it.

    seed: with the prompt's number it starts the prompt's own random stream. use_cache: False runs the whole sequence
    anew for every token (the key `recompute`). keep_logits: return the logits that each token was chosen from.
    """

    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    eod_id: int | None = None
    seed: int = 1234
    use_cache: bool = True
    keep_logits: bool = False


@dataclass
class Completion:
    """ids: the new tokens. finished: ended by the end of document or by the caller's rule, not by a limit."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False
    logits: list[torch.Tensor] = field(default_factory=list)


class PromptTooLongError(ValueError):
    """A prompt leaves no room for a new token. row: its place in the batch; length: its tokens; limit: positions."""

    def __init__(self, row: int, length: int, limit: int) -> None:
        super().__init__(f"prompt {row} has {length} tokens; the model has {limit} positions")
        self.row, self.length, self.limit = row, length, limit


@torch.inference_mode()
def decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    *,
    numbers: Sequence[int] | None = None,
    is_done: IsDone | None = None,
    on_token: Callable[[int, int], None] | None = None,
    asked: Callable[[], int] = lambda: 0,
) -> list[Completion]:
    """Continue every prompt until the end of document, `is_done`, the budget or the model's last position.

    numbers: the prompts' numbers for their random streams (unset: 0, 1, ...). is_done(new ids) ends a completion
    after that token. on_token(row, id) hears each new token as it comes. asked: the signal that asks to stop, or 0;
    polled before each token.
    Parallel: tensor-parallel ranks call it together with the same arguments and get the same tokens; `asked` must give
    them the same answers.
    Raises: PromptTooLongError; ValueError for an empty prompt; Stopped.
    """
    limit = model.spec.max_text_positions
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} has no token; use the end-of-document token to begin from nothing")
        if len(prompt) >= limit:
            raise PromptTooLongError(row, len(prompt), limit)
    generators = [_generator(settings.seed, number) for number in numbers or range(len(prompts))]
    completions = [Completion() for _ in prompts]
    sequences = [list(prompt) for prompt in prompts]
    was_training = model.training
    model.eval()
    try:
        forward = _Forward(model, sequences, settings)
        active = list(range(len(prompts)))
        while active:
            if number := asked():
                raise Stopped(number)
            logits = forward(active)
            chosen = settings.sampling.choose(logits, [generators[row] for row in active])
            for place, (row, token) in enumerate(zip(list(active), chosen, strict=True)):
                done = completions[row]
                if token == settings.eod_id:
                    done.finished = True
                    active.remove(row)
                    continue
                done.ids.append(token)
                sequences[row].append(token)
                if settings.keep_logits:
                    done.logits.append(logits[place].float().cpu())
                if on_token is not None:
                    on_token(row, token)
                done.finished = is_done is not None and is_done(done.ids)
                if done.finished or len(done.ids) == settings.max_new_tokens or len(sequences[row]) == limit:
                    active.remove(row)
    finally:
        model.train(was_training)
    return completions


def _generator(seed: int, number: int) -> torch.Generator:
    # Far apart, so that seed 1's second prompt is not seed 2's first.
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)


class _Forward:
    """The logits that follow the last token of each active sequence; the cache keeps the active rows only."""

    def __init__(self, model: Transformer, sequences: list[list[int]], settings: DecodeSettings) -> None:
        self.model, self.sequences = model, sequences
        self.device = model.output_weight.device
        self.rows = list(range(len(sequences)))
        self.cache: StaticCache | None = None
        if settings.use_cache:
            spec = model.spec
            longest = spec.num_virtual_tokens + max(map(len, sequences), default=0) + settings.max_new_tokens
            self.cache = StaticCache(
                spec,
                len(sequences),
                min(longest, spec.max_positions),
                tp_size=model.groups.tp_size,
                dtype=model.output_weight.dtype,
                device=self.device,
            )

    def __call__(self, active: list[int]) -> torch.Tensor:
        """Shapes: [len(active), vocab_size]."""
        cache, positions = self.cache, None
        new = [self.sequences[row] for row in active]
        if cache is not None:
            if active != self.rows:
                cache.keep([self.rows.index(row) for row in active])
                self.rows = list(active)
            new = [tokens[length:] for tokens, length in zip(new, cache.held, strict=True)]
            positions = cache.begin([len(tokens) for tokens in new])
        width = max(map(len, new))
        padded = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in new], device=self.device)
        hidden = self.model(padded, positions, cache.layers if cache is not None else None)
        last = torch.tensor([len(tokens) - 1 for tokens in new], device=self.device)
        return self.model.logits(hidden[torch.arange(len(new), device=self.device), last])
