"""Whether the files that a run reads are there, before any process starts.

Looks, does not open. Invariant: one error lists all files that are missing, each with the key that names it.
"""

from __future__ import annotations

from pathlib import Path

from megatron.common.errors import DataError
from megatron.config.resolved import Config

_LISTS = [f"{part}{label}_data_paths" for part in ("train", "valid", "test") for label in ("", "_label")]


def require_inputs(config: Config, *, data: bool = True) -> None:
    """Require the tokenizer's files and, with `data`, every dataset. Raises: DataError naming all that is missing."""
    problems = _tokenizer_problems(config)
    if data:
        if config.data.data_path is not None:
            problems += _dataset_problems(config, "data_path", config.data.data_path)
        for key in _LISTS:
            for prefix in getattr(config.data, key) or ():
                problems += _dataset_problems(config, key, prefix)
    if problems:
        raise DataError("\n".join(dict.fromkeys(problems)))


def _tokenizer_problems(config: Config) -> list[str]:
    tokenizer = config.tokenizer
    kind = tokenizer.tokenizer_type
    needed: list[tuple[str, str | None]] = []
    if kind in ("GPT2BPETokenizer", "HFTokenizer", "SPMTokenizer"):
        needed.append(("vocab_file", tokenizer.vocab_file))
    if kind == "GPT2BPETokenizer":
        needed.append(("merge_file", tokenizer.merge_file))
    problems = []
    for key, path in needed:
        if path is None:
            problems.append(f"{_place(config, 'tokenizer_type')}: tokenizer_type = {kind} needs {key}. Set it.")
        elif not Path(path).is_file():
            problems.append(
                f"{_place(config, key)}: {key} = {path}: there is no such file. Correct the path, or make it with "
                "prepare_data.py."
            )
    return problems


def _dataset_problems(config: Config, key: str, prefix: str) -> list[str]:
    missing = [suffix for suffix in (".bin", ".idx") if not Path(prefix + suffix).is_file()]
    if not missing:
        return []
    where = f"{_place(config, key)}: {key} = {prefix}: "
    if prefix.endswith((".bin", ".idx")) and Path(prefix).is_file():
        return [where + f"give the prefix without suffix: {prefix[:-4]}"]
    names = " and ".join(prefix + suffix for suffix in missing)
    return [
        where + f"{names} not found. Correct the path, or make the dataset with prepare_data.py or "
        "tools/datasets/preprocess_data.py."
    ]


def _place(config: Config, key: str) -> str:
    origin = config.origin(key)
    return (
        origin
        if origin not in ("default", "not set")
        else " + ".join(file.path for file in config.files) or "configuration"
    )
