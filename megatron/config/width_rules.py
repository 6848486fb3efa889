"""muP: the base model's widths out of their file, and what the keys need of each other and of the rest.

Invariant: as in `derive` and `rules`.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from megatron.config.draft import Draft
from megatron.config.schema.width import BaseShapes

_MULTIPLIERS = ("mup_init_scale", "mup_attn_temp", "mup_output_temp", "mup_embedding_mult", "mup_rp_embedding_mult")
# Whose updates have the size that the learning rate gives them (Lion's as Adam's), or that of the gradient.
UPDATE_RULES = ("adam", "lion", "sgd")
# Those whose initial values have one deviation, which can be that of another width.
_PLAIN_INIT = ("normal", "scaled_normal", "single_residual_scaled_normal", "small_init", "wang_init")


def derive_base_shapes(draft: Draft) -> None:
    """`mup_base_shapes`, out of `base_shapes_file`."""
    file = draft["base_shapes_file"]
    # Generation and evaluation have them from the checkpoint: the file may be long gone.
    is_needed = draft["use_mup"] and not draft["save_base_shapes"] and not draft.inference
    if not is_needed or file is None or draft["mup_base_shapes"] is not None:
        return
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
        shapes = BaseShapes.model_validate(content)
    except FileNotFoundError:
        draft.fail(
            "base_shapes_file",
            f"base_shapes_file = {file} is not there. Write it once from the base model's configuration: "
            "./deepy.py train.py BASE.yml --set save_base_shapes=true",
        )
    except (OSError, ValueError, ValidationError):
        names = ", ".join(BaseShapes.model_fields)
        draft.fail(
            "base_shapes_file",
            f"base_shapes_file = {file} is not a JSON object of {names}. Upstream's files are pickles of another "
            "package: write a new one with save_base_shapes: true.",
        )
    draft.derive("mup_base_shapes", shapes, "base_shapes_file")


def check_width_keys(draft: Draft) -> None:
    """Which keys need which."""
    if draft["save_base_shapes"] and draft["base_shapes_file"] is None:
        draft.problem("save_base_shapes", "save_base_shapes = true needs base_shapes_file: the file to write. Set it.")
    if draft["save_base_shapes"] and draft["coord_check"]:
        draft.problem("coord_check", "coord_check and save_base_shapes both end the run. Remove one of the two.")
    if not draft["use_mup"]:
        for name in _MULTIPLIERS:
            if draft[name] != 1.0:
                draft.problem(name, f"{name} = {draft[name]:g} needs use_mup: true. Set it, or remove {name}.")
        return
    if draft["save_base_shapes"] or draft.inference:
        return
    if draft["base_shapes_file"] is not None and draft.is_given("mup_base_shapes"):
        draft.problem(
            "mup_base_shapes",
            f"mup_base_shapes and base_shapes_file ({draft.place('base_shapes_file')}) are both set. Keep one of the "
            "two.",
        )
    if draft["mup_base_shapes"] is None:
        draft.problem(
            "use_mup",
            "use_mup = true needs the widths of the base model, at which the learning rate was found. Set "
            "base_shapes_file to what save_base_shapes: true wrote from its configuration, or mup_base_shapes.",
        )


def check_width_training(draft: Draft) -> None:
    """Rules of update and initialisation for which the scaling is known."""
    name = next((name for name in ("use_mup", "coord_check") if draft[name]), None)
    if name is None or draft["save_base_shapes"] or draft.inference:
        return
    if draft["optimizer_type"] not in UPDATE_RULES:
        draft.problem(
            "optimizer.type",
            f"optimizer.type = {draft['optimizer_type']} has no rule of learning rates under muP "
            f"({name}, {draft.place(name)}). Use Adam, Lion or SGD.",
        )
    for method in ("init_method", "output_layer_init_method"):
        if draft[method] not in _PLAIN_INIT:
            draft.problem(
                method,
                f"{method} = {draft[method]} does not scale with the width as muP ({name}, {draft.place(name)}) needs. "
                f"Use one of {', '.join(_PLAIN_INIT)}.",
            )


WIDTH_RULES = (check_width_keys, check_width_training)
