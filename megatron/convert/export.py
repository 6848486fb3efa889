"""From a native checkpoint to a Hugging Face folder that is published only if transformers computes the same with it.

The checkpoint's layout does not matter; tensors are read, converted and written one at a time. Invariant: `output`
appears with one rename, after the check.

Rows of vocabulary padding are left behind. The model masks them out of softmax and loss, so they were never trained; in
transformers, which knows no mask, they would take a share of every probability.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron.common.errors import CheckpointError
from megatron.common.files import atomic_write_text, fsync_directory
from megatron.convert.foreign import AnyReader
from megatron.convert.gpt_neox import VOCABULARY_TENSORS, config_json, source_names
from megatron.convert.hf_folder import MAX_FILE_BYTES, write_weights
from megatron.convert.hf_reference import encode
from megatron.convert.hf_tokenizer import write_tokenizer
from megatron.convert.logit_check import LogitCheck, check_logits
from megatron.model.spec import ModelSpec
from megatron.tokenizer.base import Tokenizer

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TEXTS = ("def main() -> int:\n    return 0\n", "The  quick brown fox, naïve 漢字 1234567890!", "\t\n <|endoftext|> a")


@dataclass(frozen=True)
class Exported:
    """What was written, and how far transformers' logits are from the native ones."""

    folder: Path
    tensor_bytes: int
    check: LogitCheck


def model_spec(reader: AnyReader) -> ModelSpec:
    """The architecture that a checkpoint states. Raises: CheckpointError if it states none that is known."""
    try:
        return ModelSpec.from_dict(reader.state["model_spec"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{reader.folder} states no model that this version knows: {error}") from error


def export_gpt_neox(
    reader: AnyReader,
    output: str | Path,
    precision: str,
    *,
    tokenizer: Tokenizer | None = None,
    eod_id: int | None = None,
    pad_id: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write the checkpoint as a GPTNeoXForCausalLM folder.

    precision: a key of PRECISIONS. tokenizer: written too, and its eod_id and pad_id used where the arguments are None.
    Raises: CheckpointError if `output` exists and is not empty, the architecture or the precision cannot hold the
    model, or transformers computes something else; nothing is left behind then.
    """
    spec, output = model_spec(reader), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists and is not empty. Remove it, or choose another --output_dir.")
    if tokenizer is not None:
        eod_id = tokenizer.eod_id if eod_id is None else eod_id
        pad_id = tokenizer.pad_id if pad_id is None else pad_id
    dtype = PRECISIONS[precision]
    config = config_json(spec, dtype=str(dtype).removeprefix("torch."), eod_id=eod_id, pad_id=pad_id)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensor_bytes = _write(reader, spec, temporary, dtype, max_file_bytes)
        for name, values in (("config.json", config), ("generation_config.json", _generation(eod_id, pad_id))):
            atomic_write_text(temporary / name, json.dumps(values, indent=2) + "\n")
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer, spec.max_positions)
            _check_tokenizer(temporary, tokenizer)
        check = check_logits(reader, spec, temporary, dtype)
        fsync_directory(temporary)
        if output.exists():
            output.rmdir()
        os.rename(temporary, output)
        fsync_directory(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Exported(output, tensor_bytes, check)


def _generation(eod_id: int | None, pad_id: int | None) -> dict[str, int | None]:
    return {"bos_token_id": eod_id, "eos_token_id": eod_id, "pad_token_id": pad_id}


def _write(reader: AnyReader, spec: ModelSpec, folder: Path, dtype: torch.dtype, max_file_bytes: int) -> int:
    sources = source_names(spec)
    rows = dict.fromkeys(VOCABULARY_TENSORS, spec.vocab_size)

    def get(name: str) -> torch.Tensor:
        ours = sources[name]
        tensor = reader.read(ours, rows=rows.get(ours), dtype=dtype)
        if not torch.isfinite(tensor).all():
            why = "it is not finite" if dtype == torch.float32 else f"it is not finite or beyond the range of {dtype}"
            raise CheckpointError(f"tensor {ours} of {reader.folder}: {why}. Use --precision bf16 or fp32.")
        return tensor

    shapes = {}
    for name, ours in sources.items():
        shape = reader.spec(ours).logical_shape
        shapes[name] = (rows.get(ours, shape[0]), *shape[1:])
    return write_weights(folder, shapes, dtype, get, max_file_bytes)


def _check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    for text, theirs in zip(_TEXTS, encode(folder, _TEXTS), strict=True):
        if theirs != tokenizer.encode(text):
            raise CheckpointError(
                f"transformers encodes {text!r} as {theirs}, this tokenizer as {tokenizer.encode(text)}: not written. "
                "Use --no_save_tokenizer to export the model alone."
            )
