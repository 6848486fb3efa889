"""`prepare_data.py [dataset]`: bring a corpus to the data folder and tokenise it, with upstream's flags."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from megatron.cli.preprocess_data import run_job
from megatron.data.corpora import CORPORA, download, fetch_gpt2_files
from megatron.data.preprocess import PreprocessJob
from megatron.data.stdlib_corpus import write_stdlib_corpus
from megatron.tokenizer.build import TOKENIZER_TYPES


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Fetch a corpus and tokenise it to DATA_DIR/NAME/NAME_text_document.{bin,idx}.",
        epilog="stdlib needs no network: it is the Python sources of this interpreter's standard library, as "
        "JSONL; it is tokenised only when -t or -v is given.",
    )
    names = ["stdlib", *CORPORA]
    parser.add_argument(
        "dataset", nargs="?", default="enwik8", choices=names, metavar="dataset", help=f"{', '.join(names)} [enwik8]"
    )
    parser.add_argument("-t", "--tokenizer", choices=TOKENIZER_TYPES, help="[GPT2BPETokenizer]")
    parser.add_argument(
        "-d", "--data-dir", default=os.environ.get("DATA_DIR", "./data"), help="[$DATA_DIR, else ./data]"
    )
    parser.add_argument("-v", "--vocab-file", help="[with GPT2BPETokenizer: DATA_DIR/gpt2-vocab.json, fetched]")
    parser.add_argument("-m", "--merge-file", help="[with GPT2BPETokenizer: DATA_DIR/gpt2-merges.txt, fetched]")
    parser.add_argument(
        "-f", "--force-redownload", action="store_true", help="fetch and write again what is there already"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise [all cores]")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, fetch, tokenise."""
    options = build_parser().parse_args(arguments)
    data_dir, force = Path(options.data_dir), options.force_redownload
    num_docs = None
    if options.dataset == "stdlib":
        files = write_stdlib_corpus(data_dir, force)
        print("\n".join(f"{file}: {file.stat().st_size / 1e6:.1f} MB" for file in files.all()))
        inputs, name = [files.train], "stdlib"
        if options.tokenizer is None and options.vocab_file is None:
            return 0
    else:
        corpus = CORPORA[options.dataset]
        num_docs, name = corpus.num_docs, corpus.folder
    tokenizer_type = options.tokenizer or _type_of(options.vocab_file)
    vocab_file, merge_file = options.vocab_file, options.merge_file
    if tokenizer_type == "GPT2BPETokenizer" and vocab_file is None and merge_file is None:
        vocab_file, merge_file = map(str, fetch_gpt2_files(data_dir))
    if options.dataset != "stdlib":
        inputs = download(options.dataset, data_dir, force)
    job = PreprocessJob(
        inputs=[str(file) for file in inputs],
        output_prefix=str(data_dir / name / name),
        append_eod=True,
        workers=max(1, options.workers),
        num_docs=num_docs,
    )
    run_job(job, tokenizer_type, vocab_file, merge_file, reuse=not force)
    return 0


def _type_of(vocab_file: str | None) -> str:
    """Upstream's default, unless the vocabulary is a folder's or trainer's tokenizer.json."""
    is_library_file = vocab_file is not None and Path(vocab_file).name.endswith("tokenizer.json")
    return "HFTokenizer" if is_library_file else "GPT2BPETokenizer"
