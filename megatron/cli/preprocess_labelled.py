"""`tools/datasets/preprocess_labelled.py`: labelled JSON Lines -> the token and label files of a fine-tuning task."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron.common.errors import DataError
from megatron.data.labelled import TASKS, LabelledJob, preprocess_labelled
from megatron.tokenizer.build import TOKENIZER_TYPES, make_tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and write the files. Raises: DataError."""
    parser = argparse.ArgumentParser(prog="preprocess_labelled.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--task", required=True, choices=TASKS)
    add("--input", required=True, help="files or folders, separated by commas")
    add("--output-prefix", required=True, help="path without _text_document.bin")
    add("--seq-length", type=int, required=True, help="seq_length of the model: longer documents are cut")
    add("--labels", help="names of the labels in order, separated by commas; unset: those in the data, sorted")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    add("--vocab-file", help="tokenizer.json, vocabulary, model file, or name")
    add("--merge-file", help="merges of a byte-level BPE")
    add("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    if options.seq_length < 1:
        raise DataError(f"--seq-length {options.seq_length} must be 1 or more")
    job = LabelledJob(
        task=options.task,
        inputs=[part for part in options.input.split(",") if part],
        output_prefix=options.output_prefix,
        seq_length=options.seq_length,
        labels=options.labels.split(",") if options.labels else None,
    )
    Path(options.output_prefix).parent.mkdir(parents=True, exist_ok=True)
    totals = preprocess_labelled(job, make_tokenizer(options.tokenizer_type, options.vocab_file, options.merge_file))
    print(f"{totals.documents:,} documents, {totals.cut:,} cut at {options.seq_length} tokens")
    if totals.left_out:
        print(f"warning: {totals.left_out:,} left out: they are empty, or their answer lies behind the cut")
    prefix = options.output_prefix
    print(f"For your YAML:\n  task: {options.task}\n  pack_impl: unpacked")
    if totals.labels:
        print(f"  label_names: {json.dumps(totals.labels, ensure_ascii=False)}")
    print(f'  train_data_paths: ["{prefix}_text_document"]\n  train_label_data_paths: ["{prefix}_label_document"]')
    return 0
