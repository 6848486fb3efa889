"""The reading side of a checkpoint over folders of other programs: whole logical tensors, cut to any layout.

`ForeignReader` answers what `megatron.checkpoint.Reader` answers about weights, so that training, generation,
evaluation and export read either. Not here: what the folder looks like. Invariant: nothing but weights comes out, and
every tensor has the shape of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from megatron.checkpoint import Reader
from megatron.checkpoint.location import Location
from megatron.common.errors import CheckpointError
from megatron.model.build import build_model, vocabulary_parameters
from megatron.model.spec import ModelSpec
from megatron.parallel.sharding import ShardSpec, get_shard_spec

WEIGHT = "weight"
# In a checkpoint's state: model_type and token ids of the Hugging Face model that its weights came from.
ORIGIN = "hugging_face"


class ForeignReader:
    """Weights of a folder that this program did not write.

    get: a parameter's public name -> the whole tensor, at least `spec.vocab_size` rows of vocabulary.
    what: a short name of the format, for messages. note: what was assumed, for people.
    origin: of a Hugging Face model, what its checkpoints keep of it (see ORIGIN).
    check: compare checksums of a part of the files, if there are any.
    """

    def __init__(
        self,
        folder: Location,
        spec: ModelSpec,
        get: Callable[[str], torch.Tensor],
        *,
        what: str,
        step: int = 0,
        note: str = "",
        origin: dict[str, Any] | None = None,
        check: Callable[[int, int], None] = lambda part, parts: None,
    ) -> None:
        self.folder, self.step, self.what, self.note = folder, step, what, note
        self.state: dict[str, Any] = {"model_spec": spec.to_dict(), **({ORIGIN: origin} if origin else {})}
        self.created, self.software = "", dict[str, str]()
        self._get, self._check, self._vocab_size = get, check, spec.vocab_size
        self._vocabulary = vocabulary_parameters(spec)
        model = build_model(spec, device="meta")
        self._specs = {name: get_shard_spec(parameter) for name, parameter in model.named_parameters()}

    def names(self, kind: str = WEIGHT) -> list[str]:
        """All parameters of the model."""
        return list(self._specs) if kind == WEIGHT else []

    def kinds(self, name: str) -> list[str]:
        """Only weights are read."""
        self.spec(name)
        return [WEIGHT]

    def spec(self, name: str) -> ShardSpec:
        """Logical shape and sharded dimension of a tensor."""
        try:
            return self._specs[name]
        except KeyError:
            raise CheckpointError(f"{self.folder}: the model has no tensor {name}") from None

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """The type in which a tensor is stored."""
        return self._whole(name).dtype

    def source_files(self) -> dict[str, str]:
        """None: what configuration files there are is of another program."""
        return {}

    def rank_tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """None: random states of other programs mean nothing here."""
        return {}

    def read(
        self, name: str, kind: str = WEIGHT, *, rows: int | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """As `Reader.read`."""
        self._require_weight(name, kind)
        spec, tensor = self.spec(name), self._whole(name)
        shape = (spec.logical_shape[0] if rows is None else rows, *spec.logical_shape[1:])
        if name not in self._vocabulary:
            if tuple(tensor.shape) != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} is {tuple(tensor.shape)} there, the model's is {shape}. "
                    "Set the architecture keys to those of that checkpoint."
                )
            return tensor.to(dtype or tensor.dtype, copy=True)
        if tuple(tensor.shape[1:]) != shape[1:] or len(tensor) < self._vocab_size:
            raise CheckpointError(
                f"{self.folder}: {name} is {tuple(tensor.shape)} there; the model needs at least {self._vocab_size} "
                f"rows of {shape[1]}. Use that model's tokenizer (vocab_file) and hidden_size."
            )
        result = torch.zeros(shape, dtype=dtype or tensor.dtype)
        both = min(len(tensor), len(result))
        result[:both] = tensor[:both]
        return result

    def read_shard(
        self,
        name: str,
        kind: str,
        tp_rank: int,
        tp_size: int,
        start: int = 0,
        stop: int | None = None,
        *,
        rows: int | None = None,
        dtype: torch.dtype | None = None,
        is_divided: bool | None = None,
    ) -> torch.Tensor:
        """As `Reader.read_shard`."""
        whole = self.read(name, kind, rows=rows, dtype=dtype)
        dim = self.spec(name).dim
        if is_divided is not None and is_divided != (dim is not None):
            dim = 0 if is_divided else None
        try:
            shard = ShardSpec(tuple(whole.shape), dim).take(whole, tp_rank, tp_size)
        except ValueError as error:
            raise CheckpointError(f"{name} in {self.folder}: {error}. Use another model_parallel_size.") from error
        return shard.flatten()[start:stop].clone()

    def verify(self, kinds: Collection[str] | None = None, part: int = 0, parts: int = 1) -> None:
        """Compare the stored bytes with the checksums that the format has. Raises: CheckpointError naming the file."""
        self._check(part, parts)

    def _require_weight(self, name: str, kind: str) -> None:
        if kind != WEIGHT:
            raise CheckpointError(f"{self.folder} is a {self.what}: it holds no {kind} of {name} that can be read")

    def _whole(self, name: str) -> torch.Tensor:
        return self._get(name)


AnyReader = Reader | ForeignReader
