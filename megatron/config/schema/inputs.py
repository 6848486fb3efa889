"""The keys that say what the model reads: tokenizer and datasets.

Invariant: `data` names either one prefix that `split` divides, or lists of prefixes for all three parts.
"""

from __future__ import annotations

from typing import Literal

from megatron.config.schema.base import Bool, Float, Int, Section, key

TokenizerType = Literal[
    "GPT2BPETokenizer",
    "HFTokenizer",
    "HFGPT2Tokenizer",
    "SPMTokenizer",
    "CharLevelTokenizer",
    "TiktokenTokenizer",
]


class TokenizerSection(Section):
    """The tokenizer and the rows of the embedding."""

    tokenizer_type: TokenizerType = key("GPT2BPETokenizer", "The kind of tokenizer.")
    vocab_file: str | None = key(
        None, "Its vocabulary: tokenizer.json, vocab.json, .model, or a tiktoken encoding's name."
    )
    merge_file: str | None = key(None, "Merges, for GPT2BPETokenizer.")
    make_vocab_size_divisible_by: Int = key(
        128, "The vocabulary is padded to a multiple of this times model_parallel_size.", gt=0
    )
    padded_vocab_size: Int = key(None, "Rows of the embedding. Unset: the tokenizer's vocabulary, padded.", gt=0)
    vocab_size: Int = key(
        None,
        "Ids that the model knows; those beyond the tokenizer's are never in the data, but a model that came with them "
        "may predict them. Unset: the tokenizer's.",
        gt=0,
        ours=True,
    )


class DataSection(Section):
    """The datasets."""

    data_path: str | None = key(None, "One dataset prefix (without .bin), divided by split.")
    train_data_paths: list[str] | None = key(None, "Prefixes to train on; needs the other two lists as well.")
    valid_data_paths: list[str] | None = key(None, "Prefixes to validate on.")
    test_data_paths: list[str] | None = key(None, "Prefixes for the final test.")
    train_label_data_paths: list[str] | None = key(None, "Labels beside train_data_paths; -100 is not learnt.")
    valid_label_data_paths: list[str] | None = key(None, "Labels beside valid_data_paths.")
    test_label_data_paths: list[str] | None = key(None, "Labels beside test_data_paths.")
    train_data_weights: list[Float] | None = key(None, "Share of each training prefix. Unset: equal.")
    valid_data_weights: list[Float] | None = key(None, "Share of each validation prefix.")
    test_data_weights: list[Float] | None = key(None, "Share of each test prefix.")
    weight_by_num_documents: Bool = key(False, "Weights from the numbers of documents, in place of the lists.")
    weighted_sampler_alpha: Float = key(1.0, "Exponent of weight_by_num_documents.", gt=0)
    split: str = key("969, 30, 1", "Shares of data_path for training, validation and test.")
    pack_impl: Literal["packed", "pack_until_overflow", "unpacked"] = key(
        "packed",
        "How documents fill sequences. packed: joined without gaps, cut anywhere; pack_until_overflow: as many whole "
        "documents as fit; unpacked: one document each. What the latter two leave free is not learnt.",
    )
    dataset_impl: Literal["gpt2", "pairwise", "online"] = key("gpt2", "Kind of dataset.")
    allow_chopped: Bool = key(
        True, "With pack_impl other than packed, cut documents longer than seq_length + 1; false leaves them out."
    )
    num_workers: Int = key(2, "Processes that read ahead; 0 reads in the training process.", ge=0)
    mmap_warmup: Bool = key(False, "Read the whole files once before training.")
    eod_mask_loss: Bool = key(False, "Do not learn what follows an end-of-document token.")
