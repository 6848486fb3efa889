"""Turn samples into this rank's batches.

The global batch at `consumed_samples = c` is samples [c, c + batch) of the data set's order, whatever the number of
ranks, the accumulation or the threads; micro-batch m of data-parallel rank r takes rows [(m * dp_size + r) * B, ... +
B) of it.
Invariant: `step_batches` is a pure function of its argument; reading ahead changes only when the work is done.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from megatron.common.errors import DataError
from megatron.data.token_dataset import TokenDataset


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank.

    Shapes: tokens and labels int64 [B, S], loss_mask float32 [B, S], sample_ids [B] positions in the data set's order.
    `labels[b, s]` is the token that follows `tokens[b, s]`; where `loss_mask` is 0 it counts for nothing (and is a
    valid id).
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    sample_ids: list[int]


class BatchLoader:
    """Batches of one data set for one data-parallel rank.

    Behind the last sample the order starts again from the first; the epoch follows from `consumed_samples`.
    `eod_id` with `eod_mask_loss` zeroes the loss where the *input* token ends a document. `num_workers > 0` reads the
    following steps ahead in one background thread: token files are memory-mapped, worker processes only cost.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        micro_batch_size: int,
        num_micro_batches: int,
        dp_rank: int,
        dp_size: int,
        *,
        eod_mask_loss: bool = False,
        eod_id: int | None = None,
        num_workers: int = 0,
        vocab_size: int | None = None,
        num_labels: int | None = None,
    ) -> None:
        if eod_mask_loss and eod_id is None:
            raise ValueError("eod_mask_loss needs the id of the end-of-document token")
        self.dataset = dataset
        self.micro_batch_size, self.num_micro_batches = micro_batch_size, num_micro_batches
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._masked_token = eod_id if eod_mask_loss else None
        self._vocab_size, self._num_labels = vocab_size, num_labels
        self._ahead: dict[int, Future[list[Batch]]] = {}
        self._lock = threading.Lock()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batch-loader") if num_workers > 0 else None
        self._steps_ahead = min(num_workers, 2)

    @property
    def train_batch_size(self) -> int:
        """Samples that all ranks together take per step."""
        return self.micro_batch_size * self.num_micro_batches * self.dp_size

    def epoch(self, consumed_samples: int) -> float:
        """How many times the data set's order has been passed after `consumed_samples`."""
        return consumed_samples / len(self.dataset)

    def step_batches(self, consumed_samples: int) -> list[Batch]:
        """This rank's micro-batches of the step that begins after `consumed_samples` samples of the whole run."""
        if self._executor is None:
            return self._read(consumed_samples)
        with self._lock:
            ready = self._ahead.pop(consumed_samples, None)
            wanted = [consumed_samples + k * self.train_batch_size for k in range(1, self._steps_ahead + 1)]
            for step in [s for s in self._ahead if s not in wanted]:
                self._ahead.pop(step).cancel()
            if ready is None:
                ready = self._executor.submit(self._read, consumed_samples)
            for step in wanted:
                if step not in self._ahead:
                    self._ahead[step] = self._executor.submit(self._read, step)
        return ready.result()

    def iterate(self, consumed_samples: int) -> Iterator[list[Batch]]:
        """The steps from `consumed_samples` on, without end."""
        while True:
            yield self.step_batches(consumed_samples)
            consumed_samples += self.train_batch_size

    def close(self) -> None:
        """Stop reading ahead."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None
            self._ahead.clear()

    def _read(self, consumed_samples: int) -> list[Batch]:
        rows, micro = self.micro_batch_size, np.arange(self.num_micro_batches)
        first = consumed_samples + (micro * self.dp_size + self.dp_rank) * rows
        positions = (first[:, None] + np.arange(rows)).ravel() % len(self.dataset)
        shape = (len(positions), self.dataset.seq_length + 1)
        tokens = np.empty(shape, np.int64)
        labels = np.empty(shape, np.int64) if self.dataset.has_labels else None
        self.dataset.read_into(positions, tokens, labels)
        if self._vocab_size is not None:
            self._check_tokens(tokens, positions, self._vocab_size)
        if self._num_labels is not None and labels is not None and int(labels.max()) >= self._num_labels:
            row = int(np.argmax((labels >= self._num_labels).any(axis=1)))
            raise DataError(
                f"sample {int(positions[row])} has label {int(labels[row].max())}; num_labels = {self._num_labels} "
                "means 0 to one less. Set num_labels to what preprocess_labelled.py printed for this data."
            )
        parts = [slice(start, start + rows) for start in range(0, len(positions), rows)]
        return [self._batch(tokens[p], labels[p] if labels is not None else None, positions[p]) for p in parts]

    def _check_tokens(self, tokens: np.ndarray, positions: np.ndarray, vocab_size: int) -> None:
        if int(tokens.max()) < vocab_size and int(tokens.min()) >= 0:
            return
        row = int(np.argmax((tokens >= vocab_size).any(axis=1) | (tokens < 0).any(axis=1)))
        sample = self.dataset.sample(int(positions[row]))
        raise DataError(
            f"sample {int(positions[row])} (documents {sample.documents[:4]}) holds token {int(tokens[row].max())}, "
            f"the model's vocabulary has {vocab_size} entries. The data was made with another tokenizer: make it "
            "again with the one that vocab_file names, or correct tokenizer_type and vocab_file."
        )

    def _batch(self, tokens: np.ndarray, labels: np.ndarray | None, positions: np.ndarray) -> Batch:
        inputs = tokens[:, :-1].copy()
        targets = (tokens if labels is None else labels)[:, 1:].copy()
        mask = np.ones(targets.shape, np.float32)
        if labels is not None:
            mask[targets < 0] = 0.0
            np.maximum(targets, 0, out=targets)
        if self._masked_token is not None:
            mask[inputs == self._masked_token] = 0.0
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(mask), positions.tolist())
