"""A large model in parts, so that two programs can compute the same with little memory.

A part has a run of the layers, and those rows of the vocabulary that the prompts use. Invariant: every layer is in
exactly one run, and what the folder's config.json says of a layer stays what it says.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron.convert.family import EMBEDDING, HEAD, HEAD_BIAS, Family
from megatron.convert.hf_folder import CONFIG, HFWeights, read_json, write_weights
from megatron.convert.recipes import Group
from megatron.model.spec import ModelSpec


@dataclass(frozen=True)
class Run:
    """Consecutive layers between embedding and head.

    spec: the model of these layers alone. tokens: the prompts, as ids of that model [B, T]. rows: the rows of the
    whole vocabulary that the model has, in its order [K]; None: all.
    """

    layers: range
    spec: ModelSpec
    tokens: torch.Tensor
    rows: torch.Tensor | None

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole model."""
        return self.rows is None


def runs(spec: ModelSpec, tokens: torch.Tensor, run_bytes: int) -> list[Run]:
    """One run where all fp32 weights stay within the bytes, else runs of layers that do so by themselves.

    Their models have no padded vocabulary.
    """
    H, F_, D = spec.hidden_size, spec.ffn_size, spec.head_dim
    block = 4 * H * (2 * (spec.num_heads + spec.num_kv_heads) * D + F_ * (3 if spec.is_gated else 2))
    ends = 4 * H * (spec.vocab_size * (1 if spec.tied_head else 2) + spec.max_positions)
    if ends + spec.num_layers * block <= run_bytes:
        return [Run(range(spec.num_layers), replace(spec, padded_vocab_size=spec.vocab_size), tokens, None)]
    rows, own = tokens.unique(return_inverse=True)
    width = max(1, run_bytes // block)
    return [
        Run(layers, _part_of(spec, layers, len(rows)), own, rows)
        for start in range(0, spec.num_layers, width)
        for layers in [range(start, min(start + width, spec.num_layers))]
    ]


def _part_of(spec: ModelSpec, layers: range, vocab_size: int) -> ModelSpec:
    windows = spec.window_layers
    if windows is not None:
        windows = tuple(layer - layers.start for layer in windows if layer in layers)
    return replace(
        spec, num_layers=len(layers), window_layers=windows, vocab_size=vocab_size, padded_vocab_size=vocab_size
    )


def vocabulary_groups(family: Family, spec: ModelSpec) -> list[Group]:
    """The groups of the tensors that have a row for every id: one tensor each."""
    names = {EMBEDDING, HEAD, HEAD_BIAS} if spec.task == "causal_lm" else {EMBEDDING}
    return [group for group in family.all_groups(spec) if names.intersection(group.ours)]


@contextmanager
def reference_folder(
    family: Family, whole: ModelSpec, run: Run, folder: Path, dtype: torch.dtype | None, scratch: Path
) -> Iterator[Path]:
    """The folder itself, or one of the run's part of it in `scratch`, for the time of the `with` block."""
    weights = HFWeights(folder)
    needs_rounding = dtype is not None and any(weights.dtype(name) != dtype for name in weights.names())
    if run.is_whole and not needs_rounding:
        yield folder
        return
    made = Path(tempfile.mkdtemp(prefix="layers-", dir=scratch))
    try:
        names = _names(family, whole, run, set(weights.names()))
        of_vocabulary = {theirs for group in vocabulary_groups(family, run.spec) for theirs in group.theirs}
        chosen = {new: run.rows for new in names if new in of_vocabulary and run.rows is not None}

        def read(new: str) -> torch.Tensor:
            tensor = weights.read(names[new])
            return (tensor[chosen[new]] if new in chosen else tensor).to(described[new][1])

        described: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for new, old in names.items():
            shape = weights.shape(old)
            shape = (len(chosen[new]), *shape[1:]) if new in chosen else shape
            described[new] = (shape, dtype or weights.dtype(old))
        write_weights(made, described, read)
        (made / CONFIG).write_text(json.dumps(_config(family, whole, run, folder)))
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _names(family: Family, whole: ModelSpec, run: Run, stored: set[str]) -> dict[str, str]:
    """Name in the part -> name in the folder."""
    of_whole, of_part = family.all_groups(whole), family.all_groups(run.spec)
    inside = [group for group in of_whole if group.ours[0].startswith("layers.")]
    before = of_whole.index(inside[0])
    per_layer = len(inside) // whole.num_layers
    chosen = [
        *of_whole[:before],
        *inside[run.layers.start * per_layer : run.layers.stop * per_layer],
        *of_whole[before + len(inside) :],
    ]
    names: dict[str, str] = {}
    for new, old in zip(of_part, chosen, strict=True):
        for theirs, source in zip(new.theirs, old.theirs, strict=True):
            names[theirs] = source if source in stored else source.removeprefix(family.prefix)
    return names


def _config(family: Family, whole: ModelSpec, run: Run, folder: Path) -> dict[str, Any]:
    """The folder's own config.json but for what is fewer: what it says is part of what is checked."""
    config = read_json(folder / CONFIG)
    if run.is_whole:
        return config
    layers = run.layers
    key = next(key for key in ("num_hidden_layers", "n_layer") if key in family.write(whole))
    config |= {key: len(layers), "vocab_size": run.spec.vocab_size}
    # Ids that the part may not have; a model that is given all its tokens needs none of them.
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][layers.start : layers.stop]
    if "max_window_layers" in config:
        config["max_window_layers"] = max(0, config["max_window_layers"] - layers.start)
    return config
