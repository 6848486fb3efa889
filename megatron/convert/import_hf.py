"""From a Hugging Face folder to a native checkpoint that is published only if transformers computes the same with both.

It reads config.json and the weight files directly, a group of tensors at a time. Invariant: every tensor of the model
comes out once, no tensor of the folder is passed over unless it is a constant of old versions, and `output` appears
with one rename, after the check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import Piece, Reader, save
from megatron.checkpoint.find import step_folders
from megatron.checkpoint.manifest import MANIFEST
from megatron.common.errors import CheckpointError
from megatron.common.files import atomic_write_text
from megatron.convert.families import family_of_config
from megatron.convert.family import EMBEDDING, Family
from megatron.convert.foreign import ORIGIN
from megatron.convert.hf_folder import CONFIG, HFWeights, is_finite, read_json
from megatron.convert.hf_tokenizer import carry_files, number_of_ids
from megatron.convert.logit_check import LogitCheck, check_logits
from megatron.convert.publish import new_folder, require_free
from megatron.convert.recipes import Group
from megatron.convert.yaml_config import yaml_text
from megatron.model.build import Transformer, vocabulary_parameters
from megatron.model.spec import ModelSpec
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.sharding import ShardSpec, get_shard_spec


@dataclass(frozen=True)
class Imported:
    """What was written: the checkpoint's root, the YAML beside it, the model, and how near transformers' logits are.

    warnings: what of the tokenizer will need the user's hand.
    """

    folder: Path
    config: Path
    spec: ModelSpec
    tensor_bytes: int
    check: LogitCheck
    warnings: list[str]


def read_spec(folder: str | Path) -> ModelSpec:
    """The architecture that config.json states. Raises: CheckpointError if it is missing or of an unknown model."""
    config = _read_config(Path(folder))
    return family_of_config(config).read_model(config)


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises: CheckpointError that says what the folder is instead."""
    if (folder / CONFIG).is_file() or not folder.is_dir():
        return read_json(folder / CONFIG)
    if step_folders(folder) or (folder / MANIFEST).is_file():
        why = "It is a checkpoint already: let `load` point to it. tools/ckpts/convert_neox_to_hf.py is the way back."
    elif inside := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}")):
        why = f"Of the folders in it, these have one: {', '.join(inside[:5])}."
    elif any(folder.glob("adapter_config.json")):
        why = "It is a PEFT adapter; merge it into its base model first (merge_and_unload, save_pretrained)."
    else:
        why = "Download the whole model: config.json, the weight files and the tokenizer's files."
    raise CheckpointError(f"{folder} holds no {CONFIG}, so it is no Hugging Face model. {why}")


def _about_tokenizer(folder: Path, carried: list[str], spec: ModelSpec) -> list[str]:
    if not {"tokenizer.json", "vocab.json", "tokenizer.model"}.intersection(carried):
        return [
            "there is no tokenizer in the folder (tokenizer.json, vocab.json with merges.txt, or tokenizer.model): set "
            "tokenizer_type and vocab_file in the YAML before training or generating"
        ]
    if "tokenizer.json" not in carried:
        return []
    known = number_of_ids(folder / "tokenizer.json")
    if known <= spec.vocab_size:
        return []
    return [
        f"its tokenizer.json has ids up to {known - 1}, the model rows for {spec.vocab_size}: texts with such an id "
        "cannot be fed to it, and training will refuse the pair. Is it another model's tokenizer?"
    ]


def parameter_specs(spec: ModelSpec) -> dict[str, ShardSpec]:
    """Every parameter by name with its logical shape; nothing is allocated."""
    with torch.device("meta"):
        model = Transformer(spec, ProcessGroups.single())
    return {name: get_shard_spec(parameter) for name, parameter in model.named_parameters()}


class HFSource:
    """A folder seen through its family: native tensors, made when they are asked for."""

    def __init__(self, folder: str | Path, spec: ModelSpec | None = None) -> None:
        """Raises: CheckpointError if config.json and the files do not fit each other, naming the tensor."""
        self.folder = Path(folder)
        self.config = _read_config(self.folder)
        self.family: Family = family_of_config(self.config)
        self.spec = spec or self.family.read_model(self.config)
        self.weights = HFWeights(folder)
        self.specs = parameter_specs(self.spec)
        self._stored: dict[str, str] = {}
        self._group_of: dict[str, Group] = {}
        self._last: tuple[Group, dict[str, torch.Tensor]] | None = None
        self._check_names()
        self._check_shapes()

    @property
    def origin(self) -> dict[str, Any]:
        """What checkpoints keep of the folder's model, for the way back: its model_type and special ids."""
        ids = {key: self.config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return {"model_type": self.family.model_type, **ids}

    def names(self) -> list[str]:
        """Our names of all tensors, in the order of the model."""
        return list(self.specs)

    def dtype(self, name: str) -> torch.dtype:
        """The type that a native tensor has in the folder."""
        kinds = {self.weights.dtype(self._stored[theirs]) for theirs in self._group_of[name].theirs}
        if len(kinds) > 1:
            raise CheckpointError(
                f"{self.folder}: {' and '.join(self._group_of[name].theirs)} belong into one tensor and are of "
                f"different types ({', '.join(sorted(map(str, kinds)))}). Use --precision to convert all."
            )
        return next(iter(kinds))

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A native logical tensor, in the stored type or in `dtype`. One group of tensors stays in memory."""
        group = self._group_of[name]
        if self._last is None or self._last[0] is not group:
            self._last = None
            parts = [self.weights.read(self._stored[theirs]) for theirs in group.theirs]
            if dtype is not None:
                parts = [part.to(dtype) for part in parts]
            self._last = (group, dict(zip(group.ours, group.recipe.to_native(parts), strict=True)))
        return self._last[1][name] if dtype is None else self._last[1][name].to(dtype)

    def forget(self) -> None:
        """Give back the memory of the group that was read last."""
        self._last = None

    def _check_names(self) -> None:
        found, family = set(self.weights.names()), self.family
        groups = family.all_groups(self.spec)
        expected: set[str] = set()
        for group in groups:
            self._group_of |= dict.fromkeys(group.ours, group)
            for theirs in group.theirs:
                short = theirs.removeprefix(family.prefix)
                stored = next((name for name in (theirs, short) if name in found), None)
                if stored is None:
                    raise CheckpointError(f"{self.folder} holds no tensor {theirs}, which its config.json asks for")
                self._stored[theirs] = stored
                expected.add(stored)
        tied = {family.head_name, "lm_head.weight"} & found if self.spec.tied_head else set()
        foreign = sorted(name for name in found - expected - tied if not name.endswith(family.buffers))
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise CheckpointError(
                f"{self.folder} holds {foreign[0]}{more}, no part of a {family.architecture} with this config.json"
            )
        embedding = self._stored[self._group_of[EMBEDDING].theirs[0]]
        for name in tied:
            if not torch.equal(self.weights.read(name), self.weights.read(embedding)):
                raise CheckpointError(
                    f"{self.folder}: config.json ties the output head to the embedding, and {name} differs from "
                    f'{embedding}. Set "tie_word_embeddings": false in config.json if the head is its own.'
                )

    def _check_shapes(self) -> None:
        for group in dict.fromkeys(self._group_of.values()):
            native = [torch.empty(self.specs[ours].logical_shape, device="meta") for ours in group.ours]
            for theirs, wanted in zip(group.theirs, group.recipe.to_hf(native), strict=True):
                shape = self.weights.shape(self._stored[theirs])
                if shape != tuple(wanted.shape):
                    raise CheckpointError(
                        f"{self._stored[theirs]} in {self.folder} has shape {list(shape)}; its config.json asks for "
                        f"{list(wanted.shape)}"
                    )


def read_weights(folder: str | Path, spec: ModelSpec | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(our name, logical tensor) of everything that the model has, as stored, one at a time.

    Raises: CheckpointError for a missing tensor, one that the model does not have, or one of another shape.
    """
    source = HFSource(folder, spec)
    for name in source.names():
        yield name, source.read(name)


def import_folder(
    folder: str | Path, output: str | Path, *, dtype: torch.dtype | None = None, config_out: str | Path | None = None
) -> Imported:
    """Write the folder's model as a native checkpoint `output/global_step0`, with tokenizer files and a YAML beside it.

    dtype: convert all tensors; None keeps what is stored. config_out: where the YAML goes (None: output/config.yml).
    Raises: CheckpointError if anything does not fit or transformers computes something else; nothing is left then.
    """
    source, output = HFSource(folder), Path(output)
    require_free(output, "--output")
    config_path = Path(config_out) if config_out is not None else output / "config.yml"
    if config_out is not None and config_path.exists():
        raise CheckpointError(f"{config_path} exists. Remove it, or choose another --config-out.")
    with new_folder(output, "--output") as temporary:
        kinds = {name: dtype or source.dtype(name) for name in source.names()}
        save(
            temporary,
            0,
            [_piece(source, name, kinds[name], dtype) for name in source.names()],
            _state(source, kinds),
            used_rows=dict.fromkeys(vocabulary_parameters(source.spec), source.spec.vocab_size),
            expected_names=source.names(),
        )
        reader = Reader(temporary / "global_step0")
        source.forget()
        check = check_logits(reader, source.spec, source.family, source.folder, dtype, scratch=temporary)
        carried = carry_files(source.folder, temporary)
        text = yaml_text(source.spec, output.absolute(), carried, source.folder, next(iter(kinds.values())))
        atomic_write_text(temporary / "config.yml", text)
    if config_out is not None:
        atomic_write_text(config_path, text)
        (output / "config.yml").unlink()
    numel = sum(torch.Size(source.specs[name].logical_shape).numel() * kind.itemsize for name, kind in kinds.items())
    return Imported(output, config_path, source.spec, numel, check, _about_tokenizer(output, carried, source.spec))


def _piece(source: HFSource, name: str, kind: torch.dtype, dtype: torch.dtype | None) -> Piece:
    return Piece.promised(name, "weight", source.specs[name], kind, partial(_finite, source, name, dtype))


def _finite(source: HFSource, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = source.read(name, dtype)
    if not is_finite(tensor):
        why = "it is not finite" if dtype is None else f"it is not finite or beyond the range of {dtype}"
        raise CheckpointError(f"tensor {name} of {source.folder}: {why}. Use --precision bf16 or fp32.")
    return tensor


def _state(source: HFSource, kinds: dict[str, torch.dtype]) -> dict[str, Any]:
    words = {torch.float16: "fp16", torch.bfloat16: "bfloat16"}
    return {
        "model_spec": source.spec.to_dict(),
        "position": {"step": 0, "consumed_samples": 0},
        "optimizer_steps": 0,
        "loss_scale": None,
        "layout": {"tp": 1, "pp": 1, "dp": 1, "precision": words.get(next(iter(kinds.values())), "fp32")},
        "facts": {},
        ORIGIN: source.origin,
    }
