"""From a Hugging Face GPT-NeoX folder to native tensors.

It reads config.json and the safetensors files directly; transformers is not needed. Invariant: every tensor of the
model comes out once, and no tensor of the folder is passed over unless it is a constant buffer of old versions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron.common.errors import CheckpointError
from megatron.convert.gpt_neox import native_names, spec_from_config
from megatron.convert.hf_folder import HFWeights
from megatron.model.spec import ModelSpec

_BUFFERS = (".attention.bias", ".attention.masked_bias", ".attention.rotary_emb.inv_freq")


def read_spec(folder: str | Path) -> ModelSpec:
    """The architecture that config.json states. Raises: CheckpointError if it is missing or of another model."""
    path = Path(folder) / "config.json"
    try:
        return spec_from_config(json.loads(path.read_text()))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error


def read_weights(folder: str | Path, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, logical tensor) of everything that the model has, as stored, one at a time.

    Raises: CheckpointError for a missing tensor, or one that the model does not have.
    """
    weights, names = HFWeights(folder), native_names(spec)
    tied = {"embed_out.weight", "lm_head.weight"} if spec.tied_head else set()
    foreign = [n for n in set(weights.names()) - set(names.values()) - tied if not n.endswith(_BUFFERS)]
    if foreign:
        raise CheckpointError(f"{folder} holds {sorted(foreign)[0]}, no part of a GPT-NeoX with this config.json")
    for ours, theirs in names.items():
        yield ours, weights.read(theirs)
