"""How often a run goes through each of its datasets, from the headers of their index files.

Reads a few bytes of each file, never tokens, and takes a file that is not there for what it is. Invariant: no file is
required for a plan.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from pathlib import Path

from megatron.config.resolved import Config

MAGIC, LEGACY_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
ITEM_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 4, 7: 8, 8: 2}


@dataclass(frozen=True)
class DatasetUse:
    """tokens, documents: what training reads from. epochs: passes over it; None without steps. problem: why unknown."""

    prefix: str
    tokens: int = 0
    documents: int = 0
    epochs: float | None = None
    problem: str | None = None


def dataset_uses(config: Config) -> list[DatasetUse]:
    """The training datasets of a run, in order."""
    data, iters = config.data, config.training.train_iters
    prefixes = data.train_data_paths or ([data.data_path] if data.data_path else [])
    uses = [_read(prefix, data.split if data.train_data_paths is None else None) for prefix in prefixes]
    if any(use.problem for use in uses) or not uses:
        return uses
    if data.weight_by_num_documents:
        weights = _document_weights([use.documents for use in uses], data.weighted_sampler_alpha)
    else:
        weights = list(data.train_data_weights or [1.0] * len(uses))
    total = sum(weights)
    if not iters or len(weights) != len(uses) or total <= 0:
        return uses
    tokens = iters * config.batch.train_batch_size * config.model.seq_length
    return [
        DatasetUse(use.prefix, use.tokens, use.documents, tokens * weight / total / use.tokens if use.tokens else None)
        for use, weight in zip(uses, weights, strict=True)
    ]


def _read(prefix: str, split: str | None) -> DatasetUse:
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        with index.open("rb") as stream:
            head = stream.read(56)
            if head.startswith(MAGIC):
                _, code, count = struct.unpack_from("<QBQ", head, len(MAGIC))
                width, first, in_bytes = ITEM_BYTES[code], 34 + 4 * count, True
            elif head.startswith(LEGACY_MAGIC):
                _, _, width, count = struct.unpack_from("<4Q", head, len(LEGACY_MAGIC))
                first, in_bytes = 56 + 8 * (count + 1), False
            else:
                return DatasetUse(prefix, problem=f"{index} is no index of token data")
            whole = tokens.stat().st_size // width
            documents = _train_documents(split, count)
            if documents == count:
                return DatasetUse(prefix, whole, count)
            stream.seek(first + 8 * documents)
            (start,) = struct.unpack("<q", stream.read(8))
        return DatasetUse(prefix, start // width if in_bytes else start, documents)
    except FileNotFoundError as error:
        return DatasetUse(prefix, problem=f"epochs unknown, {error.filename} is not there yet")
    except (OSError, KeyError, ValueError, struct.error) as error:
        return DatasetUse(prefix, problem=f"{index} cannot be read ({error})")


def _train_documents(split: str | None, count: int) -> int:
    """How many documents come first, for training, in a text like `969, 30, 1`."""
    if split is None:
        return count
    shares = [float(part) for part in re.split(r"[,/]", split) if part.strip()]
    ends = [round(share / sum(shares) * count) for share in shares]
    return max(0, min(count, ends[0] - (sum(ends) - count)))


def _document_weights(documents: list[int], alpha: float) -> list[float]:
    total = sum(documents)
    if len(documents) == 1 or not total:
        return [1.0] * len(documents)
    shares = [count / total for count in documents]
    return [share**alpha * (1 - share) for share in shares]
