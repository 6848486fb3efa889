"""How many documents and samples each of train, validation and test gets. Pure arithmetic.

Invariant: the three ranges of documents never overlap and together are the whole data set.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from megatron.common.errors import DataError

SPLIT_NAMES = ("train", "valid", "test")


def split_boundaries(split: str, num_documents: int) -> list[int]:
    """Document boundaries `[0, a, b, num_documents]` of the three parts of a text like `969, 30, 1`.

    Source: upstream facts 3.4: each boundary rounds its share of the documents, and what rounding left over at the
    end is taken off every boundary but the first.

    Raises: DataError when the text is not made of one to three proportions.
    """
    parts = [part for part in re.split(r"[,/]", split) if part.strip()]
    try:
        shares = [float(part) for part in parts]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or any(not math.isfinite(s) or s < 0 for s in shares) or sum(shares) <= 0:
        raise DataError(
            f"split = {split!r}: required are up to three non-negative proportions (train, validation, test) "
            "separated by commas or slashes, not all zero. Write for example split: '969, 30, 1'."
        )
    shares += [0.0] * (3 - len(shares))
    total = sum(shares)
    boundaries = [0]
    for share in shares:
        boundaries.append(boundaries[-1] + round(share / total * num_documents))
    excess = boundaries[-1] - num_documents
    return [0] + [max(0, boundary - excess) for boundary in boundaries[1:]]


def samples_needed(
    train_iters: int, train_batch_size: int, eval_interval: int, eval_iters: int
) -> tuple[int, int, int]:
    """Samples that a whole run reads from train, validation and test. Source: upstream facts 3.4."""
    validations = train_iters // eval_interval + 1
    return (
        train_iters * train_batch_size,
        validations * eval_iters * train_batch_size,
        eval_iters * train_batch_size,
    )


def document_weights(num_documents: Sequence[int], alpha: float) -> list[float]:
    """Blending weights from document counts: `weight_by_num_documents` with `weighted_sampler_alpha`.

    Source: upstream facts 3.4: p_i ~ (n_i / N) ** alpha and weight_i ~ p_i * (1 - n_i / N), normalised. A single data
    set has the weight 1 (the formula would give 0 / 0).
    """
    total = sum(num_documents)
    if len(num_documents) == 1 or total == 0:
        return [1.0 / len(num_documents)] * len(num_documents)
    shares = [count / total for count in num_documents]
    powers = [share**alpha for share in shares]
    raw = [power / sum(powers) * (1 - share) for power, share in zip(powers, shares, strict=True)]
    if sum(raw) == 0:  # all documents lie in one of several data sets
        raw = shares
    return [value / sum(raw) for value in raw]
