"""Whatever `load` points to, opened for reading: a native checkpoint, an upstream GPT-NeoX one, or a
Hugging Face folder.

Invariant: all ranks open the same folder or raise together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from megatron.checkpoint import Location, find, location, open_checkpoint
from megatron.checkpoint.find import step_folders
from megatron.checkpoint.manifest import MANIFEST
from megatron.checkpoint.reader import Share
from megatron.common.errors import CheckpointError
from megatron.convert.family import FREE_FIELDS
from megatron.convert.foreign import AnyReader, ForeignReader
from megatron.convert.hf_folder import CONFIG
from megatron.convert.import_hf import HFSource
from megatron.convert.neox_files import find_neox_folder, has_own_head, open_neox, rank_arguments, vocabulary_rows
from megatron.convert.neox_layers import GroupedLayout
from megatron.convert.setup import own_model, require_same_model
from megatron.model.spec import ModelSpec
from megatron.model.width_scaling import by_width_keys

_FREE_FIELDS = FREE_FIELDS | {"vocab_size"}


def foreign_folder(root: str | Location, step: int | None = None) -> Path | None:
    """The folder of weights of another program that `root` means; None where it is native, or nothing at all."""
    path = location(root)
    if not isinstance(path, Path) or not path.is_dir():
        return None
    if (path / MANIFEST).is_file() or any((folder / MANIFEST).is_file() for folder in step_folders(path).values()):
        return None
    return path if (path / CONFIG).is_file() else find_neox_folder(path, step)


def _open_foreign(
    folder: Path, spec: ModelSpec | None, grouped: GroupedLayout | None, may_lack_head: bool
) -> ForeignReader:
    may_lack_head = may_lack_head and spec is not None and spec.task != "causal_lm"
    if not (folder / CONFIG).is_file():
        if spec is None:
            spec = own_model(folder, vocabulary_rows(folder))
        if spec is None:
            raise CheckpointError(
                f"{folder} is a GPT-NeoX checkpoint, which does not say its model (no YAML in its configs folder): "
                "give its YAML too"
            )
        if may_lack_head:
            spec = _language_model(spec, tied_head=not has_own_head(folder, spec), head_bias=False)
        described = require_same_model(folder, spec, rank_arguments(folder))
        reader = open_neox(folder, spec, grouped)
        reader.note = described + reader.note
        return reader
    source = HFSource(folder)
    theirs = source.spec
    if may_lack_head and spec is not None and theirs.task == "causal_lm":
        spec = _language_model(spec, tied_head=theirs.tied_head, head_bias=theirs.head_bias)
    if spec is not None:
        spec = replace(spec, label_names=spec.label_names or theirs.label_names)
        _require_same(folder, spec, theirs if theirs.label_names else replace(theirs, label_names=spec.label_names))
    return ForeignReader(folder, spec or theirs, source.read, what="Hugging Face model", origin=source.origin)


def _language_model(spec: ModelSpec, *, tied_head: bool, head_bias: bool) -> ModelSpec:
    """What a model with a head of labels starts from; with such a head, the spec says no more whether it was tied."""
    return replace(spec, task="causal_lm", num_labels=0, label_names=(), tied_head=tied_head, head_bias=head_bias)


def _require_same(folder: Path, spec: ModelSpec, theirs: ModelSpec) -> None:
    """The configured model is the folder's, but for its vocabulary: tokenizers often know fewer ids than there are
    rows."""
    published, mine = by_width_keys(theirs.to_dict(), spec.to_dict())
    differing = [
        f"{name}: {CONFIG} {value!r}, config {mine[name]!r}"
        for name, value in published.items()
        if name not in _FREE_FIELDS and value != mine[name]
    ]
    if differing:
        raise CheckpointError(
            f"{folder} is of another model than the configured one:\n  " + "\n  ".join(differing) + "\nSet the "
            "architecture keys to those of that model: tools/ckpts/convert_hf_to_neox.py writes its YAML."
        )


def require_weights(root: str | Location, step: int | None = None) -> None:
    """Raises: CheckpointError if `open_weights` would find nothing there."""
    if foreign_folder(root, step) is None:
        find(root, step)


def open_weights(
    root: str | Location,
    spec: ModelSpec | None,
    step: int | None = None,
    *,
    kinds: Collection[str] | None = None,
    grouped: GroupedLayout | None = None,
    may_lack_head: bool = False,
    part: int = 0,
    parts: int = 1,
    share: Share = lambda text: [text],
    report: Callable[[str], None] = lambda note: print(note, file=sys.stderr),
) -> AnyReader:
    """As `megatron.checkpoint.open_checkpoint`, for foreign folders too.

    spec: the architecture that the configuration states; None: as the folder says itself. grouped: as in
    `open_neox`. may_lack_head: of a spec with a head of labels, take a foreign language model too.
    Raises: CheckpointError on every rank, as above, or if a foreign folder has no `spec` or does not fit it.
    """
    folder = foreign_folder(root, step)
    if len(set(share(str(folder)))) > 1:
        raise CheckpointError(f"the ranks see different folders in {root}: use shared storage")
    if folder is None:
        return open_checkpoint(root, step, kinds=kinds, part=part, parts=parts, share=share, report=report)
    problem = ""
    try:
        reader = _open_foreign(folder, spec, grouped, may_lack_head)
        reader.verify(kinds, part, parts)
    except CheckpointError as error:
        problem = str(error)
    if problems := list(dict.fromkeys(filter(None, share(problem)))):
        raise CheckpointError("\n".join(problems))
    report(f"{folder} is a {reader.what}: its weights are read as the configured model{reader.note}")
    return reader
