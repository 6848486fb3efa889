"""Writing and reading the weights of a Hugging Face folder, one tensor in memory at a time.

It knows no architecture. Invariant: no written file exceeds the limit unless it holds a single tensor, and the index
names the file of every tensor.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron.checkpoint.piece import DTYPE_NAMES, host_bytes
from megatron.common.errors import CheckpointError
from megatron.common.files import atomic_write, atomic_write_text

MAX_FILE_BYTES = 5 * 10**9
CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of one look at a part of a large tensor.
PORTION_NUMEL = 1 << 24
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

Described = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def write_weights(
    folder: Path,
    described: Described,
    get: Callable[[str], torch.Tensor],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> int:
    """Write every tensor of `described` (shape and type), asked from `get` when its turn comes; return all bytes.

    get: a tensor of the promised shape and type.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in described.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[other] for other in files[-1]) + size > max_file_bytes:
            files.append([])
        files[-1].append(name)
    file_names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    if len(files) == 1:
        file_names = [SINGLE]
    for file_name, names in zip(file_names, files, strict=True):
        _write_file(folder / file_name, {name: described[name] for name in names}, get)
    if len(files) > 1:
        where = {name: file for file, names in zip(file_names, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        atomic_write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return sum(sizes.values())


def _write_file(path: Path, described: Described, get: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (shape, dtype) in described.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in described.items():
            tensor = get(name)
            assert tuple(tensor.shape) == tuple(shape), name
            assert tensor.dtype == dtype, name
            stream.write(host_bytes(tensor))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are, found a few rows at a time: of a large tensor the question itself would double it."""
    rows = max(1, PORTION_NUMEL // max(1, tensor[:1].numel()))
    return all(bool(torch.isfinite(part).all()) for part in tensor.split(rows))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: CheckpointError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is no JSON object")
    return values


class HFWeights:
    """The tensors of a folder's files by name: safetensors, else PyTorch's pickled files, read without running code."""

    def __init__(self, folder: str | Path) -> None:
        """Raises: CheckpointError if there are none, or one of the index's files is missing or cut short."""
        self.folder = Path(folder)
        self._pickled: dict[str, dict[str, torch.Tensor]] = {}
        self._described: dict[str, tuple[tuple[int, ...], str]] = {}
        for index in (INDEX, _PICKLED_INDEX):
            if (self.folder / index).is_file():
                self._files: dict[str, str] = read_json(self.folder / index).get("weight_map", {})
                self._check_files(index)
                return
        for single in (SINGLE, _PICKLED):
            if (self.folder / single).is_file():
                self._files = dict.fromkeys(self._names_in(single), single)
                return
        raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX} (nor {_PICKLED})")

    def names(self) -> list[str]:
        """All names."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        file = self._file(name)
        if file.endswith(".bin"):
            return tuple(self._unpickled(file)[name].shape)
        with self._open(file) as opened:
            return tuple(opened.get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type, without reading it."""
        file = self._file(name)
        if file.endswith(".bin"):
            return self._unpickled(file)[name].dtype
        with self._open(file) as opened:
            word = opened.get_slice(name).get_dtype()
        known = {text: dtype for dtype, text in DTYPE_NAMES.items()}
        if word not in known or not known[word].is_floating_point:
            raise CheckpointError(
                f"{name} in {self.folder / file} is of type {word}, not one of F64, F32, F16, BF16. "
                "Quantized models cannot be converted; use the original weights."
            )
        return known[word]

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises: CheckpointError if it is not there."""
        file = self._file(name)
        if file.endswith(".bin"):
            return self._unpickled(file)[name]
        with self._open(file) as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def _file(self, name: str) -> str:
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        return self._files[name]

    def _check_files(self, index: str) -> None:
        for file in sorted(set(self._files.values())):
            if not (self.folder / file).is_file():
                raise CheckpointError(f"{self.folder / file} is missing; {index} names it. Download it again.")
            inside = set(self._names_in(file))
            for name, home in self._files.items():
                if home == file and name not in inside:
                    raise CheckpointError(f"{self.folder / file} holds no tensor {name}, where {index} says it lies")

    def _names_in(self, file: str) -> list[str]:
        if file.endswith(".bin"):
            return list(self._unpickled(file))
        with self._open(file) as opened:
            return list(opened.keys())

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / file} is damaged or cut short ({error}). Download it again."
            ) from error

    def _unpickled(self, file: str) -> dict[str, torch.Tensor]:
        if file not in self._pickled:
            try:
                self._pickled = {file: torch.load(self.folder / file, map_location="cpu", weights_only=True, mmap=True)}
            except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
                reason = str(error).strip().split("\n")[0]
                raise CheckpointError(
                    f"{self.folder / file} cannot be read as plain tensors ({reason}). Download it again, or convert "
                    "it to safetensors."
                ) from error
        return self._pickled[file]
