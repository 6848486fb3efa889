"""Upstream's checkpoint folders: which files there are, and their tensors by layer and tensor-parallel rank.

    layer_LL-model_TT-model_states.pt               pipeline: one state_dict per layer and tensor-parallel rank
    mp_rank_TT_model_states.pt                      no pipeline: `module` with keys `sequential.{layer}.{name}`
    zero_pp_rank_D_mp_rank_TT_{model,optim}_states.pt   ZeRO 3: flat fp32 partitions, `param_shapes` tells them apart

Files are memory mapped and unpickled without running code: what is no tensor or plain value becomes an inert object.
Invariant: nothing is taken from a folder of which a file is missing.
"""

from __future__ import annotations

import functools
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron.common.errors import CheckpointError
from megatron.convert.foreign import ForeignReader
from megatron.convert.neox_layers import GroupedLayout, is_foreign, layers_with_tensors, logical_tensor
from megatron.model.spec import ModelSpec

_LAYER_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO3_FILE = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_model_states\.pt")
_LEGACY_MLP = ("mlp.dense_h_to_4h.weight", "mlp.w1.weight")

# layer -> its tensors, for one tensor-parallel rank
_Layers = dict[int, dict[str, torch.Tensor]]


class _Rank:
    """The layers of one tensor-parallel rank. numbers: which there are; read: one of them."""

    def __init__(self, numbers: Callable[[], Collection[int]], read: Callable[[int], dict[str, torch.Tensor]]) -> None:
        self.numbers, self.read = numbers, read

    @classmethod
    def at_once(cls, read: Callable[[], _Layers]) -> _Rank:
        """All layers come with one file."""
        cached = functools.cache(read)
        return cls(lambda: cached(), lambda layer: cached()[layer])


def find_neox_folder(root: Path, step: int | None = None) -> Path | None:
    """The folder of upstream's newest checkpoint under `root`, or of `step`, or `root` itself; None if it has none."""
    if _is_neox(root):
        return root
    if step is not None:
        names = [f"global_step{step}", str(step)]
    else:
        latest = root / "latest"
        names = [latest.read_text().strip()] if latest.is_file() else []
        numbered = (path for path in root.glob("global_step*") if path.name.removeprefix("global_step").isdecimal())
        names += [path.name for path in sorted(numbered, key=_step, reverse=True)]
    return next((root / name for name in names if name and _is_neox(root / name)), None)


def open_neox(folder: Path, spec: ModelSpec, grouped: GroupedLayout | None = None) -> ForeignReader:
    """The weights of one upstream checkpoint folder (`find_neox_folder`), read as a model of `spec`.

    grouped: how grouped-query attention was laid out; None takes `per_head` for files with the old names of the MLP
    and `blocks` otherwise.
    Raises: CheckpointError for a missing or damaged file, or one of another model.
    """
    ranks = _ranks(folder)
    loaded = functools.cache(lambda layer, tp_rank: ranks[tp_rank].read(layer))
    for tp_rank, rank in enumerate(ranks):
        _require_layers(folder, spec, rank)
        for layer in rank.numbers():
            _require_known(folder, spec, layer, tp_rank, loaded(layer, tp_rank))

    def stored(layer: int, names: Sequence[str]) -> list[torch.Tensor]:
        holders = [loaded(layer, tp_rank) for tp_rank in range(len(ranks))]
        found = next((name for name in names if name in holders[0]), None)
        return [] if found is None else [holder[found] for holder in holders]

    note = ""
    if grouped is None:
        grouped = "per_head" if any(name in loaded(2, 0) for name in _LEGACY_MLP) else "blocks"
        if spec.num_kv_heads != spec.num_heads:
            note = f"; its grouped-query attention as {grouped} (upstream_gqa_layout chooses)"

    def get(name: str) -> torch.Tensor:
        try:
            return logical_tensor(spec, name, stored, grouped)
        except (KeyError, RuntimeError, CheckpointError) as error:
            raise CheckpointError(
                f"{folder}: {name} cannot be read: {error}. Set the architecture keys (num_layers, norm, activation, "
                "num_kv_heads, biases) to those of that checkpoint."
            ) from error

    return ForeignReader(
        folder,
        spec,
        get,
        what="GPT-NeoX checkpoint",
        step=_step(folder),
        note=note,
        check=lambda part, parts: _check_zip(folder, part, parts),
    )


def rank_arguments(folder: Path) -> dict[str, Any]:
    """Sizes of the model that upstream noted in its mp_rank files; empty where there are none."""
    path = folder / "mp_rank_00_model_states.pt"
    arguments = _load(path).get("args") if path.is_file() else None
    return arguments if isinstance(arguments, dict) else {}


def vocabulary_rows(folder: Path) -> int:
    """Rows of the embedding, those of padding included."""
    name = "word_embeddings.weight"
    held = [rank.read(0) for rank in _ranks(folder) if 0 in rank.numbers()]
    if not held or not all(name in state for state in held):
        raise CheckpointError(f"{folder} holds no {name} in its layer 0, so it is no GPT-NeoX model")
    return sum(len(state[name]) for state in held)


def has_own_head(folder: Path, spec: ModelSpec) -> bool:
    """Whether the output head has a matrix of its own there, and is not the embedding."""
    rank, layer = _ranks(folder)[0], spec.num_layers + 4
    return layer in rank.numbers() and "final_linear.weight" in rank.read(layer)


def _is_neox(folder: Path) -> bool:
    return folder.is_dir() and any(
        pattern.fullmatch(path.name) for path in folder.iterdir() for pattern in (_LAYER_FILE, _RANK_FILE, _ZERO3_FILE)
    )


def _step(folder: Path) -> int:
    digits = re.search(r"(\d+)$", folder.name)
    return int(digits.group(1)) if digits else 0


def _ranks(folder: Path) -> list[_Rank]:
    """The tensor-parallel ranks of the checkpoint."""
    by_layer = _numbered(folder, _LAYER_FILE)
    if by_layer:
        tp_size = 1 + max(tp_rank for _, tp_rank in by_layer)
        missing = [
            f"layer_{layer:02d}-model_{tp_rank:02d}-model_states.pt"
            for layer in sorted({layer for layer, _ in by_layer})
            for tp_rank in range(tp_size)
            if (layer, tp_rank) not in by_layer
        ]
        _require(folder, missing)

        numbers = {layer for layer, _ in by_layer}
        return [
            _Rank(lambda: numbers, functools.partial(lambda tp_rank, layer: _load(by_layer[layer, tp_rank]), tp_rank))
            for tp_rank in range(tp_size)
        ]
    partitioned = _numbered(folder, _ZERO3_FILE)
    whole = _numbered(folder, _RANK_FILE)
    tp_size = 1 + max(key[-1] for key in (partitioned or whole))
    if partitioned:
        dp_size = 1 + max(dp_rank for dp_rank, _ in partitioned)
        return [_Rank.at_once(functools.partial(_zero3, folder, tp_rank, dp_size)) for tp_rank in range(tp_size)]
    _require(folder, [f"mp_rank_{r:02d}_model_states.pt" for r in range(tp_size) if (r,) not in whole])
    return [_Rank.at_once(functools.partial(_module, whole[(tp_rank,)])) for tp_rank in range(tp_size)]


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[tuple[int, ...], Path]:
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {tuple(map(int, match.groups())): path for match, path in matches if match}


def _require(folder: Path, missing: Collection[str]) -> None:
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(f"{folder} is not complete: {', '.join(list(missing)[:3])}{more} missing. Copy it again.")


def _require_layers(folder: Path, spec: ModelSpec, rank: _Rank) -> None:
    """A config of another depth, or with a tied head, must not pass over layers without a word."""
    there, needed = set(rank.numbers()), set(layers_with_tensors(spec))
    # A tied head of a pipeline is the embedding once more.
    extra = there - needed - ({spec.num_layers + 4} if spec.tied_head else set())
    if needed - there or extra:
        blocks = max(there) - 4, max(there) - 3
        raise CheckpointError(
            f"{folder} holds the layers 0 to {max(there)}, so its model has {blocks[0]} blocks and an untied head, or "
            f"{blocks[1]} blocks and a tied one; the config says num_layers = {spec.num_layers}, no_weight_tying = "
            f"{not spec.tied_head}. Use the configuration it was trained with"
            + (f", or copy the folder again: layer {min(needed - there)} is missing." if needed - there else ".")
        )


def _require_known(folder: Path, spec: ModelSpec, layer: int, tp_rank: int, state: dict[str, torch.Tensor]) -> None:
    foreign = [key for key in state if is_foreign(spec, layer, key)]
    if foreign:
        raise CheckpointError(
            f"{folder}: layer {layer} of tensor-parallel rank {tp_rank} holds {foreign[0]}, which the configured model "
            "does not have. Use the configuration that it was trained with (norm, biases, pos_emb, no_weight_tying)."
        )


def _module(path: Path) -> _Layers:
    """The layers of an mp_rank file that holds the whole model of one tensor-parallel rank."""
    module = _load(path).get("module")
    if not isinstance(module, dict) or not module:
        raise CheckpointError(f"{path} holds no weights, and there are no layer_* files beside it. Copy them as well.")
    return _split(module, path)


def _split(module: dict[str, torch.Tensor], path: Path) -> _Layers:
    layers: _Layers = {}
    for key, tensor in module.items():
        match = re.fullmatch(r"(?:module\.)?sequential\.(\d+)\.(.+)", key)
        if match is None:
            raise CheckpointError(f"{path} holds {key}; a GPT-NeoX model has sequential.<layer>.<name>")
        layers.setdefault(int(match.group(1)), {})[match.group(2)] = tensor
    return layers


def _zero3(folder: Path, tp_rank: int, dp_size: int) -> _Layers:
    """The layers of one tensor-parallel rank out of the fp32 partitions of all data-parallel ranks.

    Each parameter is cut into dp_size equal parts, the last one padded; a rank's parts lie one after another in the
    order of `param_shapes`.
    """
    models = [folder / f"zero_pp_rank_{rank}_mp_rank_{tp_rank:02d}_model_states.pt" for rank in range(dp_size)]
    prefixes = ("", "bf16_")
    optims = []
    for rank in range(dp_size):
        name = f"zero_pp_rank_{rank}_mp_rank_{tp_rank:02d}_optim_states.pt"
        found = [folder / f"{prefix}{name}" for prefix in prefixes if (folder / f"{prefix}{name}").is_file()]
        optims.append(found[0] if found else folder / name)
    _require(folder, [path.name for path in (*models, *optims) if not path.is_file()])
    shapes = [item for group in _load(models[0])["param_shapes"] for item in group.items()]
    flats = []
    for path in optims:
        groups = _load(path)["optimizer_state_dict"].get("fp32_flat_groups")
        if not groups:
            raise CheckpointError(f"{path} holds no fp32_flat_groups: it was not written by ZeRO stage 3")
        flats.append(torch.cat([group.flatten() for group in groups]) if len(groups) > 1 else groups[0].flatten())
    module, offset = {}, 0
    for name, shape in shapes:
        width = -(-math.prod(shape) // dp_size)
        parts = [flat.narrow(0, offset, width) for flat in flats]
        module[name] = torch.cat(parts).narrow(0, 0, math.prod(shape)).view(tuple(shape))
        offset += width
    return _split(module, models[0])


class _Inert:
    """Stands for an object of a class that is of no use here; keeps nothing and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _load(path: Path) -> dict[str, Any]:
    """What a file holds, memory mapped, without running any of the code that a pickle may name."""
    try:
        is_zip = zipfile.is_zipfile(path)
        others = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        inert = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in others]
        with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
            state = torch.load(path, map_location="cpu", mmap=is_zip or None, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: it is cut short, damaged or no torch file ({error})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, no state_dict")
    return state


def _check_zip(folder: Path, part: int, parts: int) -> None:
    """Compare the checksums that torch's files carry for each tensor."""
    used = [p for p in sorted(folder.iterdir()) if any(r.fullmatch(p.name) for r in (_LAYER_FILE, _RANK_FILE))]
    for path in used[part::parts]:
        if not zipfile.is_zipfile(path):
            continue
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged: the checksum of {damaged} in it does not fit. Copy it again.")
