"""What a rank gives to a save: fragments of logical tensors, and how they lie in its safetensors file.

It writes no file itself. Invariant: `encode` yields exactly the bytes of a safetensors file, and the index entries it
fills in state the offset and the CRC-32 of every piece in them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from megatron.common.errors import CheckpointError
from megatron.common.heartbeat import beat
from megatron.parallel.sharding import ShardSpec

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_CHUNK_BYTES = 1 << 24
# Below this, handing the work to another thread costs more than doing it.
_OVERLAP_BYTES = 1 << 18


@dataclass(frozen=True)
class Piece:
    """The elements [start, stop) of the flattened tensor-parallel shard `tp_rank` of `tp_size` of the tensor `name`.

    kind: "weight" (fp32 master), "exp_avg", "exp_avg_sq", or any other state of the tensor's shape.
    tensor: stop - start elements of any shape, on any device.
    replica: a copy of what another rank writes: compared by checksum, not written. A replicated tensor's pieces of
        tensor-parallel ranks other than 0 are replicas without saying so.
    load: makes the elements when their bytes are written, so that one tensor at a time is in memory; `tensor` then
        tells their shape and type alone (on "meta").
    """

    name: str
    kind: str
    spec: ShardSpec
    tp_rank: int
    tp_size: int
    start: int
    stop: int
    tensor: torch.Tensor
    replica: bool = False
    load: Callable[[], torch.Tensor] | None = None

    @classmethod
    def whole(
        cls, name: str, kind: str, spec: ShardSpec, tensor: torch.Tensor, tp_rank: int = 0, tp_size: int = 1
    ) -> Piece:
        """All of one tensor-parallel shard."""
        return cls(name, kind, spec, tp_rank, tp_size, 0, spec.shard_numel(tp_size), tensor)

    @classmethod
    def promised(
        cls, name: str, kind: str, spec: ShardSpec, dtype: torch.dtype, load: Callable[[], torch.Tensor]
    ) -> Piece:
        """All of a tensor that is made when it is written."""
        tensor = torch.empty(spec.logical_shape, dtype=dtype, device="meta")
        return cls(name, kind, spec, 0, 1, 0, tensor.numel(), tensor, load=load)

    @property
    def is_replica(self) -> bool:
        """Whether another rank writes these elements."""
        return self.replica or (self.spec.dim is None and self.tp_rank != 0)

    @property
    def key(self) -> str:
        """Its name in the safetensors file."""
        return f"{self.kind}/{self.name}/tp{self.tp_rank}of{self.tp_size}/{self.start}:{self.stop}"

    def check(self) -> None:
        """Raises: CheckpointError if the range does not fit the shard or the tensor."""
        size = self.spec.shard_numel(self.tp_size)
        if not 0 <= self.start <= self.stop <= size or not 0 <= self.tp_rank < self.tp_size:
            raise CheckpointError(f"{self.key}: the shard has {size} elements on each of {self.tp_size} ranks")
        if self.tensor.numel() != self.stop - self.start:
            raise CheckpointError(f"{self.key}: a tensor of {self.tensor.numel()} elements was given")
        if self.tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(f"{self.key}: {self.tensor.dtype} cannot be stored; use one of {sorted(DTYPES)}")


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in host memory; a copy only where it lies on a device or is not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A single element counts as contiguous with any stride, but `view` to another type insists on 1.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8).numpy().data


def checksum(data: memoryview, value: int = 0) -> int:
    """CRC-32, taken in portions that stay in the processor's cache."""
    for begin in range(0, len(data), _CHUNK_BYTES):
        value = zlib.crc32(data[begin : begin + _CHUNK_BYTES], value)
    return value


def encode(
    tensors: Sequence[tuple[str, torch.Tensor, dict[str, Any]]],
    loads: Mapping[str, Callable[[], torch.Tensor]] | None = None,
) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file holding each (key, tensor) as a flat array.

    Each third member, an index entry, receives `dtype`, `offset` (in the file, bytes) and `crc32` as the bytes go by;
    tensors on a device are copied to the host one at a time. loads: by key, what makes the elements of a tensor
    that only tells its shape and type.
    """
    # Wide types first: every array then starts at a multiple of its item size, which memory mapping needs.
    ordered = sorted(tensors, key=lambda item: -item[1].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for key, tensor, entry in ordered:
        if key in header:
            raise CheckpointError(f"{key} was given twice by one rank")
        end = position + tensor.numel() * tensor.element_size()
        entry["dtype"] = DTYPE_NAMES[tensor.dtype]
        entry["offset"] = position
        header[key] = {"dtype": entry["dtype"], "shape": [tensor.numel()], "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    with ThreadPoolExecutor(1, thread_name_prefix="checksum") as counting:
        for key, tensor, entry in ordered:
            if loads and key in loads:
                made = loads[key]()
                assert (made.shape, made.dtype) == (tensor.shape, tensor.dtype)
                tensor = made
            data = host_bytes(tensor)
            entry["offset"] += 8 + len(text)
            entry["crc32"] = 0
            for begin in range(0, len(data), _CHUNK_BYTES):
                chunk = data[begin : begin + _CHUNK_BYTES]
                beat()
                if len(chunk) < _OVERLAP_BYTES:
                    entry["crc32"] = zlib.crc32(chunk, entry["crc32"])
                    yield chunk
                    continue
                # Neither crc32 nor write holds the interpreter's lock: the caller writes while this thread counts.
                value = counting.submit(zlib.crc32, chunk, entry["crc32"])
                yield chunk
                entry["crc32"] = value.result()


def index_entries(pieces: Sequence[Piece], rank_tensors: Mapping[str, torch.Tensor]) -> dict[str, list[dict[str, Any]]]:
    """Empty index entries for what a rank writes (`pieces`, `rank_tensors`) and for the copies it holds
    (`replicas`)."""

    def describe(piece: Piece) -> dict[str, Any]:
        return {
            "name": piece.name,
            "kind": piece.kind,
            "shape": list(piece.spec.logical_shape),
            "dim": piece.spec.dim,
            "tp_rank": piece.tp_rank,
            "tp_size": piece.tp_size,
            "start": piece.start,
            "stop": piece.stop,
        }

    return {
        "pieces": [describe(piece) for piece in pieces if not piece.is_replica],
        "replicas": [
            describe(piece) | {"crc32": checksum(host_bytes(piece.tensor))} for piece in pieces if piece.is_replica
        ],
        "rank_tensors": [{"name": name, "shape": list(tensor.shape)} for name, tensor in rank_tensors.items()],
    }
