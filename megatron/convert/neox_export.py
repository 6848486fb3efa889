"""From a native checkpoint to upstream's layout: what GPT-NeoX itself, and every tool made for it, loads.

Weights alone are written, as upstream's own converters do. Invariant: the folder appears with one rename, after
every file was read back and compared.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.common.errors import CheckpointError
from megatron.common.files import atomic_write_text, fsync_directory
from megatron.convert.foreign import AnyReader
from megatron.convert.neox_files import open_neox
from megatron.convert.neox_layers import layer_shard, layers_with_tensors
from megatron.model.build import vocabulary_parameters
from megatron.model.spec import ModelSpec

# What upstream can express in weights alone (ALiBi and sinusoidal positions keep constants in its checkpoints).
_POSSIBLE: dict[str, tuple[Any, ...]] = {
    "norm": ("layernorm", "rmsnorm"),
    "position": ("rotary", "learned", "none"),
    "activation": ("gelu", "gelu_tanh", "relu", "silu", "geglu", "swiglu", "reglu", "bilinear", "glu"),
    "head_bias": (False,),
    "qk_norm": (False,),
    "norm_offset": (False,),
    "rotary_interleaved": (False,),
    "rope_scaling": (None,),
    "window_layers": (None,),
    "embedding_scale": (1.0,),
    "mup": (None,),
}


def export_neox(
    reader: AnyReader,
    spec: ModelSpec,
    output: Path,
    *,
    dtype: torch.dtype,
    tp_size: int = 1,
    with_layer_files: bool = True,
    configs: Mapping[str, str] | None = None,
) -> Path:
    """Write `output/global_stepN` and `output/latest`; the folder of the step is returned.

    with_layer_files: one file per layer (pipe_parallel_size >= 1 upstream), otherwise one per tensor-parallel rank.
    configs: YAML files to put beside, by name.
    Raises: CheckpointError if the folder of that step exists, upstream cannot express the model, or what was written
    does not read back as the same tensors; nothing is left behind then.
    """
    _require_expressible(spec)
    folder = output / f"global_step{reader.step}"
    if folder.exists():
        raise CheckpointError(f"{folder} exists already. Remove it, or choose another folder.")
    temporary = output / f".{folder.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "configs").mkdir(parents=True)
    try:
        for name, text in (configs or {}).items():
            atomic_write_text(temporary / "configs" / name, text)
        _write(reader, spec, temporary, dtype, tp_size, with_layer_files)
        _compare(reader, spec, temporary, dtype)
        fsync_directory(temporary)
        os.rename(temporary, folder)
        atomic_write_text(output / "latest", folder.name)
        fsync_directory(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _require_expressible(spec: ModelSpec) -> None:
    wrong = [f"{key} is {getattr(spec, key)}" for key, known in _POSSIBLE.items() if getattr(spec, key) not in known]
    if spec.qkv_bias != spec.attention_bias:
        wrong.append("the biases of query, key and value are switched apart from that of the output")
    if spec.head_dim * spec.num_heads != spec.hidden_size:
        wrong.append(f"{spec.num_heads} heads of {spec.head_dim} are not hidden_size {spec.hidden_size}")
    if wrong:
        raise CheckpointError(f"GPT-NeoX cannot compute this model: {'; '.join(wrong)}")


def _write(
    reader: AnyReader, spec: ModelSpec, folder: Path, dtype: torch.dtype, tp_size: int, with_layer_files: bool
) -> None:
    rows = dict.fromkeys(vocabulary_parameters(spec), spec.padded_vocab_size)

    def whole(name: str) -> torch.Tensor:
        # Conversion comes last: biases are divided over the ranks in fp32 first.
        return reader.read(name, rows=rows.get(name), dtype=torch.float32)

    for tp_rank in range(tp_size):
        module: dict[str, torch.Tensor] = {}
        for layer in layers_with_tensors(spec):
            state = {
                key: tensor.to(dtype).contiguous().clone()
                for key, tensor in layer_shard(spec, layer, tp_rank, tp_size, whole)
            }
            if with_layer_files:
                torch.save(state, folder / f"layer_{layer:02d}-model_{tp_rank:02d}-model_states.pt")
            else:
                module |= {f"sequential.{layer}.{key}": tensor for key, tensor in state.items()}
        facts = {"dp_world_size": 1, "mp_world_size": tp_size, "optimizer": {}, "skipped_steps": 0}
        facts |= {"global_steps": reader.step, "iteration": reader.step, "module": module}
        torch.save(facts, folder / f"mp_rank_{tp_rank:02d}_model_states.pt")


def _compare(reader: AnyReader, spec: ModelSpec, folder: Path, dtype: torch.dtype) -> None:
    """Read everything back through the importer: each tensor is the checkpoint's, rounded to `dtype`."""
    written = open_neox(folder, spec, "blocks")
    for name in written.names():
        rows = spec.padded_vocab_size if name in vocabulary_parameters(spec) else None
        theirs, ours = (source.read(name, rows=rows, dtype=torch.float32) for source in (written, reader))
        # Sums of rounded shares of a bias may be off by a rounding of each share.
        if not torch.allclose(theirs, ours.to(dtype).float(), rtol=4 * torch.finfo(dtype).eps, atol=0.0):
            raise CheckpointError(f"{name} does not survive in {dtype}: use a wider --precision")
