"""In which order several data sets take turns, so that each gets its weight's share at every moment.

At step t the turn goes to the data set with the largest `weight * max(t, 1) - turns so far` (the first one wins ties).
That rule is sequential. It forgets its past quickly, though: two runs of it that start from different counts soon
agree. So the steps are cut into pieces which all advance together in one array operation, each from guessed counts;
afterwards each piece is replayed from the true counts until it meets the guess. The result is exact whatever the
guesses were.
Invariant: `blend_turns(weights, n)` is a prefix of `blend_turns(weights, m)` for n <= m.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron.common.errors import DataError

MAX_DATASETS = 255
_PIECE_STEPS = 4096


@dataclass(frozen=True)
class Blend:
    """Whose turn it is and which of its own samples that is.

    Shapes: dataset_ids [num_samples] uint8, sample_ids [num_samples] uint32 (int64 beyond), counts [num_datasets]
    int64 (turns in all).
    """

    dataset_ids: np.ndarray
    sample_ids: np.ndarray
    counts: np.ndarray


def normalise_weights(weights: Sequence[float]) -> np.ndarray:
    """Weights that sum to 1.

    Raises: DataError when one is negative or not a number, when all are zero, or when there are too many.
    """
    values = np.array(weights, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all() or (values < 0).any() or values.sum() <= 0:
        raise DataError(
            f"data weights {list(weights)}: required are non-negative numbers, at least one of them above zero."
        )
    if len(values) >= MAX_DATASETS:
        raise DataError(
            f"{len(values)} data sets are blended, at most {MAX_DATASETS - 1} can be. Merge some of them first."
        )
    return values / values.sum()


def build_blend(weights: Sequence[float], num_samples: int) -> Blend:
    """The first `num_samples` turns. Source: upstream facts 3.4 (BlendableDataset)."""
    normalised = normalise_weights(weights)
    # A data set of weight 0 would win ties (upstream lets it); it takes no turn here.
    taking_part = np.flatnonzero(normalised)
    turns = taking_part.astype(np.uint8)[blend_turns(normalised[taking_part], num_samples)]
    counts = np.bincount(turns, minlength=len(normalised)).astype(np.int64)
    # A stable sort puts the turns of each data set side by side, in order: their ranks there are its sample numbers.
    sample_ids = np.empty(num_samples, np.uint32 if num_samples < 2**32 else np.int64)
    sample_ids[np.argsort(turns, kind="stable")] = np.concatenate([np.arange(count) for count in counts])
    return Blend(turns, sample_ids, counts)


def blend_turns(weights: np.ndarray, num_samples: int) -> np.ndarray:
    """Whose turn it is at each of `num_samples` steps, as uint8. `weights` must sum to 1."""
    if len(weights) == 1:
        return np.zeros(num_samples, np.uint8)
    num_pieces = num_samples // _PIECE_STEPS
    if num_pieces < 4:
        return _replay(weights, 0, np.zeros(len(weights), np.int64), num_samples)
    starts = np.arange(num_pieces, dtype=np.int64) * _PIECE_STEPS
    guessed = _likely_counts(weights, starts)
    turns = _advance_together(weights, starts, guessed)
    counts = np.zeros(len(weights), np.int64)
    for piece in range(num_pieces):
        if not np.array_equal(counts, guessed[piece]):
            _mend(weights, int(starts[piece]), counts, guessed[piece], turns[piece])
        counts += np.bincount(turns[piece], minlength=len(weights))
    done = num_pieces * _PIECE_STEPS
    return np.concatenate((turns.ravel(), _replay(weights, done, counts, num_samples - done)))


def _likely_counts(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Whole counts near `weights * step` that sum to step: the largest remainders are rounded up. [pieces, datasets]"""
    exact = weights * steps[:, None]
    counts = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(counts - exact, axis=1, kind="stable"), axis=1)
    return counts + (rank < (steps - counts.sum(axis=1))[:, None])


def _advance_together(weights: np.ndarray, starts: np.ndarray, guessed: np.ndarray) -> np.ndarray:
    counts = guessed.astype(np.float64)
    rows = np.arange(len(starts))
    turns = np.empty((_PIECE_STEPS, len(starts)), np.uint8)
    deficit = np.empty_like(counts)
    for offset in range(_PIECE_STEPS):
        steps = np.maximum(starts + offset, 1).astype(np.float64)
        np.multiply(steps[:, None], weights, out=deficit)
        np.subtract(deficit, counts, out=deficit)
        chosen = deficit.argmax(axis=1)
        counts[rows, chosen] += 1
        turns[offset] = chosen
    return np.ascontiguousarray(turns.T)


def _mend(weights: np.ndarray, start: int, counts: np.ndarray, guessed: np.ndarray, turns: np.ndarray) -> None:
    """Replay one piece from the true counts, in place, until true and guessed counts meet."""
    true = counts.astype(np.float64)
    gap = counts - guessed
    open_gaps = int(np.count_nonzero(gap))
    deficit = np.empty_like(true)
    for offset in range(len(turns)):
        np.multiply(weights, float(max(start + offset, 1)), out=deficit)
        np.subtract(deficit, true, out=deficit)
        chosen, was = int(deficit.argmax()), int(turns[offset])
        true[chosen] += 1
        if chosen != was:
            turns[offset] = chosen
            for index, change in ((chosen, 1), (was, -1)):
                open_gaps += int(gap[index] == 0)
                gap[index] += change
                open_gaps -= int(gap[index] == 0)
            if open_gaps == 0:
                return


def _replay(weights: np.ndarray, start: int, counts: np.ndarray, num_steps: int) -> np.ndarray:
    turns = np.empty(num_steps, np.uint8)
    true = counts.astype(np.float64)
    deficit = np.empty_like(true)
    for offset in range(num_steps):
        np.multiply(weights, float(max(start + offset, 1)), out=deficit)
        np.subtract(deficit, true, out=deficit)
        chosen = int(deficit.argmax())
        turns[offset] = chosen
        true[chosen] += 1
    return turns
