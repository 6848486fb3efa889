"""`tools/datasets/preprocess_data.py`: text corpora to `.bin/.idx` token files, with upstream's flags."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from megatron.common.errors import DataError
from megatron.data.preprocess import PreprocessJob, preprocess
from megatron.data.provenance import describe_job, is_up_to_date, record_job
from megatron.tokenizer.build import TOKENIZER_TYPES, make_tokenizer


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Tokenise JSONL or plain text (.jsonl, .txt; also .gz .zst .bz2 .xz, .tar, .zip) "
        "into PREFIX_KEY_document.{bin,idx}."
    )
    data = parser.add_argument_group("input")
    data.add_argument("--input", required=True, help="files or folders, separated by commas")
    data.add_argument(
        "--jsonl-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys to tokenise, each into its own pair [text]",
    )
    data.add_argument("--num-docs", type=int, help="number of documents where known, for the progress line")
    data.add_argument("--ftfy", action="store_true", help="mend broken encodings with ftfy")
    tokenizer = parser.add_argument_group("tokenizer")
    tokenizer.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    tokenizer.add_argument("--vocab-file", help="tokenizer.json, vocabulary, model file, or name")
    tokenizer.add_argument("--merge-file", help="merges of a byte-level BPE")
    tokenizer.add_argument("--append-eod", action="store_true", help="end every document with <|endoftext|>")
    output = parser.add_argument_group("output")
    output.add_argument("--output-prefix", required=True, help="path without _KEY_document.bin")
    output.add_argument(
        "--dataset-impl", default="mmap", choices=["lazy", "cached", "mmap"], help="mmap is the one that trains"
    )
    output.add_argument(
        "--reuse", action="store_true", help="do nothing when the output was made from this input with this tokenizer"
    )
    runtime = parser.add_argument_group("running")
    runtime.add_argument(
        "--workers", type=int, default=1, help="processes that tokenise; the output is the same for any number [1]"
    )
    runtime.add_argument(
        "--log-interval", type=int, default=100, help="documents between progress lines, at most one a second [100]"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and tokenise."""
    options = build_parser().parse_args(arguments)
    if options.dataset_impl != "mmap":
        raise DataError(
            f"--dataset-impl {options.dataset_impl}: that older format cannot be trained from, so it is read but no "
            "longer written. Leave the option out."
        )
    if options.workers < 1 or options.log_interval < 1:
        raise DataError(f"--workers {options.workers} --log-interval {options.log_interval}: both must be 1 or more.")
    job = PreprocessJob(
        inputs=[part for part in options.input.split(",") if part],
        output_prefix=options.output_prefix,
        keys=options.jsonl_keys,
        append_eod=options.append_eod,
        fix_text=options.ftfy,
        workers=options.workers,
        log_interval=options.log_interval,
        num_docs=options.num_docs,
    )
    run_job(job, options.tokenizer_type, options.vocab_file, options.merge_file, reuse=options.reuse)
    return 0


def run_job(
    job: PreprocessJob, tokenizer_type: str, vocab_file: str | None, merge_file: str | None, reuse: bool
) -> None:
    """Tokenise, or with `reuse` find that it was done already, and note beside the output what it was made from."""
    make = functools.partial(make_tokenizer, tokenizer_type, vocab_file, merge_file)
    description = describe_job(job, make().fingerprint)
    if reuse and is_up_to_date(job, description):
        print(f"{', '.join(job.output_prefixes())}: up to date, nothing to do")
        return
    preprocess(job, make)
    record_job(job, description)
    print("\n".join(f"wrote {prefix}.bin and .idx" for prefix in job.output_prefixes()))
