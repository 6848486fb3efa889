"""What an upstream checkpoint says of its own model, in its YAML files and in its mp_rank files.

Its weights do not tell heads, positions, the residual's style or an epsilon apart: read as another model they compute
something else without a word. Invariant: nothing is taken from these files but for comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.common.errors import CheckpointError, ConfigError
from megatron.config import load
from megatron.config.schema import ModelSection
from megatron.config.source import read_source
from megatron.convert.yaml_config import architecture_keys
from megatron.model.from_config import model_spec
from megatron.model.spec import ModelSpec

# They choose kernels and initial values, or are compared tensor by tensor.
_NO_PART = {"attention_config", "attention_backend", "init_method", "output_layer_init_method", "init_method_std"}
_FREE = {"seq_length", "attention_dropout", "hidden_dropout", *_NO_PART}
_OF_RANK_FILES = ("num_layers", "hidden_size", "num_attention_heads")


def own_files(folder: Path) -> list[Path]:
    """The YAML files that upstream saved with a step, or else the one beside it (the 20B release)."""
    if found := sorted((folder / "configs").glob("*.yml")):
        return found
    beside = sorted((folder.parent / "configs").glob("*.yml"))
    # Several are a collection of configurations, and not what this model was trained with.
    return beside if len(beside) == 1 else []


def require_same_model(folder: Path, spec: ModelSpec, of_rank_file: Mapping[str, Any]) -> str:
    """Compare the configured model with what the checkpoint says; returns what it agrees with, for people.

    of_rank_file: `args` of an mp_rank file; may be empty.
    Raises: CheckpointError naming every key that differs, with both values.
    """
    differing = [
        f"{key}: the mp_rank files {of_rank_file[key]!r}, config {mine!r}"
        for key, mine in zip(_OF_RANK_FILES, (spec.num_layers, spec.hidden_size, spec.num_heads), strict=True)
        if of_rank_file.get(key, mine) != mine
    ]
    files = own_files(folder)
    names = ", ".join(str(path) for path in files)
    defaults = {"seq_length": spec.max_positions}
    theirs = _spec_of(files, defaults, spec.vocab_size, spec.padded_vocab_size, names)
    if theirs is not None:
        saved, mine = (
            {key: value for key, (value, _) in architecture_keys(one).items() if key not in _FREE}
            for one in (theirs, spec)
        )
        if spec.position != "learned":
            saved["max_position_embeddings"] = mine["max_position_embeddings"]
        differing += [
            f"{_called(key, saved, mine)}: the checkpoint {saved.get(key)!r}, config {mine.get(key)!r}"
            for key in {**saved, **mine}
            if saved.get(key) != mine.get(key)
        ]
    if differing:
        raise CheckpointError(
            f"{folder} is of another model than the configured one"
            + (f", as {names} says" if theirs is not None else "")
            + ":\n  "
            + "\n  ".join(differing)
            + "\nSet these keys to the checkpoint's values (an absent key has upstream's default)."
        )
    return f", as {names} describes it" if theirs is not None else ""


def own_model(folder: Path, vocab_rows: int) -> ModelSpec | None:
    """The model that the checkpoint's own YAML files describe, with all its rows of vocabulary; None without files.

    Raises: CheckpointError if they describe no model that is known here.
    """
    files = own_files(folder)
    return _spec_of(files, {}, vocab_rows, vocab_rows, ", ".join(str(path) for path in files))


def _called(key: str, saved: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    """The key that a user would set."""
    if key == "activation" and {saved[key], mine[key]} in ({"gelu", "gelu_tanh"}, {"geglu", "geglu_tanh"}):
        return "bias_gelu_fusion (activation)"
    return key


def _spec_of(
    files: list[Path], defaults: Mapping[str, Any], vocab_size: int, padded_vocab_size: int, names: str
) -> ModelSpec | None:
    """The model that the files describe, but for its vocabulary; None where they describe none."""
    if not files:
        return None
    try:
        values: dict[str, Any] = {}
        for path in files:
            values |= read_source(path).values
        known = {
            key: value for key, value in values.items() if key in ModelSection.model_fields and key not in _NO_PART
        }
        if "num_layers" not in known:
            return None
        given = {"vocab_size": vocab_size, "padded_vocab_size": padded_vocab_size, "train_micro_batch_size_per_gpu": 1}
        return model_spec(load([], {**defaults, **known, **given}, planning=True))
    except ConfigError as error:
        raise CheckpointError(
            f"{names}, the checkpoint's own configuration, describes no model of here: {error}"
        ) from error
