"""The tokenizer's files in a Hugging Face folder.

Invariant: what is written is read alike by transformers 4.38 to 5.x (which is why no class of 5.x is named).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron.common.errors import CheckpointError
from megatron.common.files import atomic_write_text
from megatron.convert.hf_folder import read_json
from megatron.tokenizer.base import EOD_PIECE, PAD_PIECE, Tokenizer

_SETTINGS = "tokenizer_config.json"
_CARRIED = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "generation_config.json", "chat_template.jinja"),
)


def carry_files(source: Path, target: Path) -> list[str]:
    """Copy what belongs to the tokenizer and to generation from one folder to another; returns the names.

    transformers 5 names a class that 4 does not have; it is replaced by the one that both load.
    """
    names = [name for name in _CARRIED if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, target / name)
    if (source / _SETTINGS).is_file():
        settings = read_json(source / _SETTINGS)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            settings.pop("backend", None)
        atomic_write_text(target / _SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        names.append(_SETTINGS)
    return names


def number_of_ids(path: Path) -> int:
    """One more than the largest id in a tokenizer.json; 0 for a kind whose vocabulary is not understood."""
    values = read_json(path)
    vocab = values.get("model", {}).get("vocab", {})
    # Unigram models list pieces with their scores.
    ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
    ids += [token["id"] for token in values.get("added_tokens") or []]
    return 1 + max(ids, default=-1)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_positions: int) -> None:
    """Write tokenizer.json (or vocab.json and merges.txt), tokenizer_config.json and special_tokens_map.json.

    Raises: CheckpointError for a tokenizer that has no files of these kinds.
    """
    sources = tokenizer.source_files
    if len(sources) == 1 and sources[0].suffix == ".json":
        targets, tokenizer_class = ["tokenizer.json"], "PreTrainedTokenizerFast"
    elif [path.suffix for path in sources] == [".json", ".txt"]:
        targets, tokenizer_class = ["vocab.json", "merges.txt"], "GPT2TokenizerFast"
    else:
        raise CheckpointError(
            f"a {type(tokenizer).__name__} made of {[path.name for path in sources] or 'no file'} cannot be written "
            "for transformers. Use --no_save_tokenizer and provide the tokenizer yourself."
        )
    for source, target in zip(sources, targets, strict=True):
        shutil.copyfile(source, folder / target)
    has_settings = (sources[0].parent / _SETTINGS).is_file()
    if has_settings:
        # It was imported with its settings: they say more than we know.
        carry_files(sources[0].parent, folder)
    if targets == ["tokenizer.json"]:
        _write_merges_as_text(folder / "tokenizer.json")
    if has_settings:
        return
    special: dict[str, str] = {}
    if tokenizer.eod_id is not None:
        special |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), EOD_PIECE)
    if tokenizer.pad_id is not None:
        special["pad_token"] = PAD_PIECE
    config: dict[str, Any] = {
        "tokenizer_class": tokenizer_class,
        "model_max_length": max_positions,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **special,
    }
    for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        atomic_write_text(folder / name, json.dumps(values, indent=2) + "\n")


def _write_merges_as_text(path: Path) -> None:
    """Merges as "a b" and not ["a", "b"]: tokenizers before 0.20, of transformers before 4.45, know nothing else.

    Later versions read both. Left as it is where a piece has a space in it, which text cannot tell apart.
    """
    values = read_json(path)
    merges = values.get("model", {}).get("merges") or []
    if not merges or not all(isinstance(pair, list) for pair in merges) or any(" " in "".join(pair) for pair in merges):
        return
    values["model"]["merges"] = [" ".join(pair) for pair in merges]
    atomic_write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
