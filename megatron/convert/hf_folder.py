"""Writing and reading the weights of a Hugging Face folder, one tensor in memory at a time.

It knows no architecture. Invariant: no file exceeds the limit unless it holds a single tensor, and the index names
the file of every tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron.checkpoint.piece import DTYPE_NAMES, host_bytes
from megatron.common.errors import CheckpointError
from megatron.common.files import atomic_write, atomic_write_text

MAX_FILE_BYTES = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    get: Callable[[str], torch.Tensor],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> int:
    """Write every tensor of `shapes`, asked from `get` when its turn comes; return the bytes of all tensors.

    get: a tensor of the promised shape and of `dtype`.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    files: list[list[str]] = [[]]
    for name, size in sizes.items():
        if files[-1] and sum(sizes[other] for other in files[-1]) + size > max_file_bytes:
            files.append([])
        files[-1].append(name)
    file_names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    if len(files) == 1:
        file_names = [SINGLE]
    for file_name, names in zip(file_names, files, strict=True):
        _write_file(folder / file_name, {name: shapes[name] for name in names}, dtype, get)
    if len(files) > 1:
        where = {name: file for file, names in zip(file_names, files, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        atomic_write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return sum(sizes.values())


def _write_file(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, get: Callable[[str], torch.Tensor]
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = get(name)
            assert tuple(tensor.shape) == tuple(shape), name
            assert tensor.dtype == dtype, name
            stream.write(host_bytes(tensor))


class HFWeights:
    """The tensors of a folder's safetensors files by name."""

    def __init__(self, folder: str | Path) -> None:
        """Raises: CheckpointError if there are none."""
        self.folder = Path(folder)
        if (self.folder / INDEX).is_file():
            self._files: dict[str, str] = json.loads((self.folder / INDEX).read_text())["weight_map"]
        elif (self.folder / SINGLE).is_file():
            with safe_open(self.folder / SINGLE, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), SINGLE)
        else:
            raise CheckpointError(f"{self.folder} holds neither {SINGLE} nor {INDEX}")

    def names(self) -> list[str]:
        """All names."""
        return list(self._files)

    def read(self, name: str) -> torch.Tensor:
        """One tensor. Raises: CheckpointError if it is not there."""
        if name not in self._files:
            raise CheckpointError(f"{self.folder} holds no tensor {name}")
        with safe_open(self.folder / self._files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor
