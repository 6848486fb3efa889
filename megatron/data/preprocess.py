"""From text corpora to token files: read, tokenise in parallel, write in order.

Knows no tokenizer by name: it is given a picklable function that makes one. Memory is bounded by a few blocks per
worker.
Invariant: the written bytes depend on the input and the tokenizer alone, never on the number of workers.
"""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from megatron.common.documents import Block, find_inputs, parse_documents, read_blocks
from megatron.common.errors import DataError
from megatron.data.indexed import token_dtype
from megatron.data.indexed_writer import IndexedWriter


class Encoder(Protocol):
    """The part of a tokenizer that is needed here."""

    vocab_size: int
    eod_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class PreprocessJob:
    """What to tokenise and how. One pair `{output_prefix}_{key}_document.{bin,idx}` is written for each key."""

    inputs: Sequence[str]
    output_prefix: str
    keys: Sequence[str] = ("text",)
    append_eod: bool = False
    fix_text: bool = False
    workers: int = 1
    log_interval: int = 100
    num_docs: int | None = None
    report: Callable[[str], None] = print

    def output_prefixes(self) -> list[str]:
        """Prefixes of the pairs that this job writes."""
        return [f"{self.output_prefix}_{key}_document" for key in self.keys]


@dataclass
class Totals:
    """What a job read and wrote."""

    documents: int = 0
    empty: int = 0
    text_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class _Encoded:
    """Tokens of one block: for each key all tokens joined, and how many belong to each document."""

    tokens: list[np.ndarray]
    sizes: list[np.ndarray]
    empty: int
    text_bytes: int


class _BlockEncoder:
    """Turns a block into token arrays; one lives in every worker."""

    def __init__(self, job: PreprocessJob, encoder: Encoder) -> None:
        if job.append_eod and encoder.eod_id is None:
            raise DataError(
                "--append-eod: this tokenizer has no <|endoftext|>. Leave the option out, or use another tokenizer."
            )
        self._keys, self._encoder = tuple(job.keys), encoder
        self._dtype = token_dtype(encoder.vocab_size)
        self._ending = [encoder.eod_id] if job.append_eod and encoder.eod_id is not None else []
        self._fix = _load_text_fixer() if job.fix_text else None

    def __call__(self, block: Block) -> _Encoded:
        documents = parse_documents(block, self._keys)
        if self._fix is not None:
            documents = [tuple(map(self._fix, document)) for document in documents]
        # A document without any text would leave a lone end-of-document token behind.
        kept = [document for document in documents if any(document)]
        tokens, sizes = [], []
        for position in range(len(self._keys)):
            encoded = self._encoder.encode_batch([document[position] for document in kept])
            lengths = np.fromiter((len(ids) + len(self._ending) for ids in encoded), np.int32, len(encoded))
            joined = itertools.chain.from_iterable(itertools.chain(ids, self._ending) for ids in encoded)
            tokens.append(np.fromiter(joined, self._dtype, int(lengths.sum(dtype=np.int64))))
            sizes.append(lengths)
        return _Encoded(tokens, sizes, len(documents) - len(kept), len(block.data))


def preprocess(job: PreprocessJob, make_encoder: Callable[[], Encoder]) -> Totals:
    """Tokenise a corpus. The pairs appear under their names only when all of it is done.

    Raises: DataError when an input is missing, damaged or not what the keys say, or when no document is left.
    """
    files = find_inputs(job.inputs)
    encoder = make_encoder()
    encode = _BlockEncoder(job, encoder)
    # Many processes with many threads each would fight for the same cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    totals, began, last_report = Totals(tokens=dict.fromkeys(job.keys, 0)), time.perf_counter(), 0.0
    reported = 0
    with ExitStack() as stack:
        writers = [
            stack.enter_context(IndexedWriter(p, token_dtype(encoder.vocab_size))) for p in job.output_prefixes()
        ]
        blocks = itertools.chain.from_iterable(read_blocks(file) for file in files)
        results = map(encode, blocks) if job.workers <= 1 else _encode_in_processes(job, make_encoder, blocks)
        for encoded in results:
            before = totals.documents
            _take(encoded, writers, job.keys, totals)
            totals.seconds = time.perf_counter() - began
            passed_interval = totals.documents // job.log_interval > before // job.log_interval
            if passed_interval and totals.seconds - last_report >= 1.0:
                last_report, reported = totals.seconds, totals.documents
                job.report(_progress_line(totals, job.num_docs))
        if totals.documents == 0:
            raise DataError(
                f"{', '.join(map(str, files[:3]))}: no document with text in {len(files)} file(s): nothing written."
            )
    totals.seconds = time.perf_counter() - began
    if reported != totals.documents:
        job.report(_progress_line(totals, totals.documents))
    return totals


def _take(encoded: _Encoded, writers: Sequence[IndexedWriter], keys: Sequence[str], totals: Totals) -> None:
    for key, writer, tokens, sizes in zip(keys, writers, encoded.tokens, encoded.sizes, strict=True):
        writer.add_documents(tokens, sizes)
        totals.tokens[key] += len(tokens)
    totals.documents += len(encoded.sizes[0])
    totals.empty += encoded.empty
    totals.text_bytes += encoded.text_bytes


def _progress_line(totals: Totals, num_docs: int | None) -> str:
    seconds = max(totals.seconds, 1e-9)
    share = f" of {num_docs:,}" if num_docs and num_docs != totals.documents else ""
    empty = f", {totals.empty:,} empty ones left out" if totals.empty else ""
    return (
        f"{totals.documents:,}{share} documents ({totals.documents / seconds:,.0f} docs/s, "
        f"{totals.text_bytes / 1e6 / seconds:,.2f} MB/s), {sum(totals.tokens.values()):,} tokens{empty}"
    )


def _load_text_fixer() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError as error:
        raise DataError("--ftfy needs the package ftfy: pip install -r requirements/requirements-data.txt") from error
    fix: Callable[[str], str] = ftfy.fix_text
    return fix


_worker_encode: _BlockEncoder | None = None


def _start_worker(job: PreprocessJob, make_encoder: Callable[[], Encoder]) -> None:
    global _worker_encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encode = _BlockEncoder(job, make_encoder())


def _encode_in_worker(block: Block) -> _Encoded:
    assert _worker_encode is not None
    return _worker_encode(block)


def _encode_in_processes(
    job: PreprocessJob, make_encoder: Callable[[], Encoder], blocks: Iterator[Block]
) -> Iterator[_Encoded]:
    """Encode blocks in worker processes; results come in the order of the blocks, a bounded number is under way."""
    context = multiprocessing.get_context("spawn")
    worker_job = PreprocessJob(job.inputs, job.output_prefix, job.keys, job.append_eod, job.fix_text)
    pool = ProcessPoolExecutor(job.workers, context, _start_worker, (worker_job, make_encoder))
    pending: collections.deque[Future[_Encoded]] = collections.deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_encode_in_worker, block))
            if len(pending) >= 3 * job.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a tokenising worker was killed, most likely for want of memory: nothing was written. Use fewer --workers."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def written_pairs(job: PreprocessJob) -> list[Path]:
    """The files a job writes, for checking whether they are there."""
    return [Path(prefix + ending) for prefix in job.output_prefixes() for ending in (".bin", ".idx")]
