"""From a native checkpoint to a Hugging Face folder that is published only if transformers computes the same with it.

The checkpoint's layout does not matter; tensors are read, converted and written a group at a time. Invariant: `output`
appears with one rename, after the check.

Rows of vocabulary padding are left behind. The model masks them out of softmax and loss, so they were never trained; in
transformers, which knows no mask, they would take a share of every probability.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.common.errors import CheckpointError
from megatron.common.files import atomic_write_text
from megatron.convert.families import FAMILIES, family_for
from megatron.convert.family import Family
from megatron.convert.foreign import ORIGIN, AnyReader, ForeignReader
from megatron.convert.hf_folder import CONFIG, MAX_FILE_BYTES, is_finite, write_weights
from megatron.convert.hf_reference import encode
from megatron.convert.hf_tokenizer import carry_files, write_tokenizer
from megatron.convert.logit_check import LogitCheck, check_logits
from megatron.convert.publish import new_folder, require_free
from megatron.convert.reader_versions import needed_versions
from megatron.convert.recipes import Group
from megatron.model.build import vocabulary_parameters
from megatron.model.spec import ModelSpec
from megatron.tokenizer.base import Tokenizer

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TEXTS = ("def main() -> int:\n    return 0\n", "The  quick brown fox, naïve 漢字 1234567890!", "\t\n <|endoftext|> a")


@dataclass(frozen=True)
class Exported:
    """What was written, as which architecture, and how far transformers' logits are from the native ones.

    needs: what readers older than the last line's version make of it (megatron.convert.reader_versions).
    """

    folder: Path
    architecture: str
    tensor_bytes: int
    check: LogitCheck
    needs: list[tuple[tuple[int, int], str]]


def model_spec(reader: AnyReader) -> ModelSpec:
    """The architecture that a checkpoint states. Raises: CheckpointError if it states none that is known."""
    try:
        return ModelSpec.from_dict(reader.state["model_spec"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{reader.folder} states no model that this version knows: {error}") from error


def choose_family(reader: AnyReader, spec: ModelSpec, asked: str | None) -> Family:
    """The family to write: the one asked for, the one that the model came from, or the first that computes it."""
    came_from = reader.state.get(ORIGIN, {}).get("model_type")
    if asked is None and came_from in FAMILIES and not FAMILIES[came_from].refusals(spec):
        return FAMILIES[came_from]
    return family_for(spec, asked)


def is_untouched(reader: AnyReader) -> bool:
    """Whether this is a Hugging Face model as it was imported, and not what a run has made of it."""
    return ORIGIN in reader.state and not reader.state.get("facts")


def export_checkpoint(
    reader: AnyReader,
    output: str | Path,
    precision: str,
    *,
    model_type: str | None = None,
    tokenizer: Tokenizer | None = None,
    eod_id: int | None = None,
    pad_id: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write the checkpoint as a folder that transformers loads.

    precision: a key of PRECISIONS, or "stored": every tensor in the type it has in the checkpoint. model_type: the
    architecture to write; None chooses. tokenizer: written too, and its eod_id and pad_id used where the arguments are
    None; without either, those of the model that was imported.
    Raises: CheckpointError if `output` exists and is not empty, the architecture or the precision cannot hold the
    model, or transformers computes something else; nothing is left behind then.
    """
    spec, output = model_spec(reader), Path(output)
    require_free(output, "--output_dir")
    family = choose_family(reader, spec, model_type)
    dtype = None if precision == "stored" else PRECISIONS[precision]
    source = _Source(reader, spec, family, dtype)
    ids = _token_ids(reader, spec, tokenizer, eod_id, pad_id)
    config = config_json(family, spec, dtype=source.main_dtype, ids=ids)
    with new_folder(output, "--output_dir", needed_bytes=source.num_bytes) as temporary:
        tensor_bytes = write_weights(temporary, source.described, source.get, max_file_bytes)
        del source  # and the tensors that it still holds
        for name, values in ((CONFIG, config), ("generation_config.json", ids)):
            atomic_write_text(temporary / name, json.dumps(values, indent=2) + "\n")
        # An imported model's own generation settings and tokenizer files lie beside its checkpoint.
        if is_untouched(reader) and isinstance(reader.folder, Path):
            carry_files(reader.folder if isinstance(reader, ForeignReader) else reader.folder.parent, temporary)
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer, spec.max_positions)
            _check_tokenizer(temporary, tokenizer)
        check = check_logits(reader, spec, family, temporary, dtype, scratch=temporary)
    needs = needed_versions(family.model_type, family.as_expressed(spec))
    return Exported(output, config["architectures"][0], tensor_bytes, check, needs)


def config_json(
    family: Family, spec: ModelSpec, *, dtype: torch.dtype, ids: dict[str, int | list[int] | None]
) -> dict[str, Any]:
    """The content of config.json, read alike by transformers 4.38 to 5.x: old and new readers look for the type under
    different keys, so both are written."""
    word = str(dtype).removeprefix("torch.")
    return {
        **family.config(spec),
        **ids,
        "use_cache": True,
        "dtype": word,
        "torch_dtype": word,
    }


def _token_ids(
    reader: AnyReader, spec: ModelSpec, tokenizer: Tokenizer | None, eod_id: int | None, pad_id: int | None
) -> dict[str, int | list[int] | None]:
    if tokenizer is not None:
        eod_id = tokenizer.eod_id if eod_id is None else eod_id
        pad_id = tokenizer.pad_id if pad_id is None else pad_id
    ids: dict[str, int | list[int] | None] = {
        key: reader.state.get(ORIGIN, {}).get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    for key, value in ids.items():
        # A run with a tokenizer of its own may know fewer ids than the model that it started from.
        if any(token >= spec.vocab_size for token in (value if isinstance(value, list) else [value or 0])):
            ids[key] = None
    if eod_id is not None:
        ids["eos_token_id"] = eod_id
        # A model that never had a mark of its own for the beginning starts from the end of another document.
        ids["bos_token_id"] = eod_id if ids["bos_token_id"] is None else ids["bos_token_id"]
    if pad_id is not None:
        ids["pad_token_id"] = pad_id
    return ids


class _Source:
    """The checkpoint in the family's names. A group's tensors are kept until another group is asked for."""

    def __init__(self, reader: AnyReader, spec: ModelSpec, family: Family, dtype: torch.dtype | None) -> None:
        self.reader, self.dtype = reader, dtype
        # Rows of padding stay behind.
        self.rows = dict.fromkeys(vocabulary_parameters(spec), spec.vocab_size)
        self.described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._group_of: dict[str, Group] = {}
        self._last: tuple[Group, dict[str, torch.Tensor]] | None = None
        for group in family.all_groups(spec):
            kind = dtype or reader.dtype(group.ours[0])
            shapes = [self._shape(name) for name in group.ours]
            for theirs, tensor in zip(
                group.theirs, group.recipe.to_hf([torch.empty(shape, device="meta") for shape in shapes]), strict=True
            ):
                self.described[theirs] = (tuple(tensor.shape), kind)
                self._group_of[theirs] = group

    @property
    def num_bytes(self) -> int:
        """Of all tensors that will be written."""
        return sum(math.prod(shape) * kind.itemsize for shape, kind in self.described.values())

    @property
    def main_dtype(self) -> torch.dtype:
        """What config.json names: the type of the first tensor."""
        return next(iter(self.described.values()))[1]

    def get(self, name: str) -> torch.Tensor:
        """A tensor of the file to write. Raises: CheckpointError for one that is not finite, or not any more."""
        group = self._group_of[name]
        if self._last is None or self._last[0] is not group:
            self._last = None
            native = [self._read(ours) for ours in group.ours]
            self._last = (group, dict(zip(group.theirs, group.recipe.to_hf(native), strict=True)))
        return self._last[1][name]

    def _shape(self, ours: str) -> tuple[int, ...]:
        shape = self.reader.spec(ours).logical_shape
        return (self.rows.get(ours, shape[0]), *shape[1:])

    def _read(self, ours: str) -> torch.Tensor:
        tensor = self.reader.read(ours, rows=self.rows.get(ours), dtype=self.dtype)
        if not is_finite(tensor):
            dtype = self.dtype
            why = "it is not finite" + (
                f" or beyond the range of {dtype}" if dtype not in (None, torch.float32) else ""
            )
            raise CheckpointError(f"tensor {ours} of {self.reader.folder}: {why}. Use --precision bf16 or fp32.")
        return tensor


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    for text, theirs, marked in zip(_TEXTS, encode(folder, _TEXTS), encode(folder, _TEXTS, marks=True), strict=True):
        # A tokenizer.json that sets marks around a text (Llama's) does so here as well.
        if tokenizer.encode(text) not in (theirs, marked):
            raise CheckpointError(
                f"transformers encodes {text!r} as {theirs}, this tokenizer as {tokenizer.encode(text)}: not written. "
                "Use --no_save_tokenizer to export the model alone."
            )
