"""What train.py does in place of training for muP: write the base model's widths, or check coordinates.

Invariant: one process does it, the others of the job end at once; nothing is collective.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron.common.errors import ConfigError
from megatron.common.files import atomic_write_text
from megatron.config import Config
from megatron.config.schema import BaseShapes
from megatron.engine.distributed import local_device
from megatron.model.from_config import model_spec
from megatron.model.width_scaling import update_rule
from megatron.observe.plot import plot_movements
from megatron.optim.build import build_optimizer
from megatron.training.coordinate_check import REPEATS, STEPS, Movement, ladder, measure, table, verdict
from megatron.training.setup import run_folder


def run_in_place_of_training(config: Config) -> bool:
    """Do what save_base_shapes or coord_check asks for; False if neither does."""
    is_first = os.environ.get("RANK", "0") == "0"
    if config.width.save_base_shapes and is_first:
        save_base_shapes(config)
    if config.width.coord_check and is_first:
        check_coordinates(config)
    return config.width.ends_the_run


def save_base_shapes(config: Config) -> None:
    """Write the widths of the configuration's model to base_shapes_file. Raises: ConfigError if it holds others."""
    model, file = config.model, config.width.base_shapes_file
    assert file is not None
    shapes = BaseShapes.model_validate({name: getattr(model, name) for name in BaseShapes.model_fields})
    text = json.dumps(shapes.model_dump(), indent=1) + "\n"
    given = f"{config.origin('base_shapes_file')}: base_shapes_file = {file}"
    try:
        if Path(file).exists() and Path(file).read_bytes() != text.encode():
            raise ConfigError(
                f"{given} exists and holds something else than the widths of this model ({_listed(shapes)}). Runs may "
                "be scaled by it: remove it first if it is not needed, or choose another name."
            )
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, text)
    except OSError as error:
        raise ConfigError(f"{given} cannot be written: {error.strerror}. Name a file that can be.") from error
    print(f"wrote {file}: {_listed(shapes)}")


def _listed(shapes: BaseShapes) -> str:
    return ", ".join(f"{name} {value}" for name, value in shapes.model_dump().items())


def check_coordinates(config: Config) -> None:
    """Say how far activations move at several widths, with muP and without; write it down, and draw it."""
    chosen, device = config.optimizer, local_device(config.launcher.device)
    specs = ladder(model_spec(config), config.width.mup_width_scale)
    print(
        f"coordinate check: {specs[0].num_layers} layers, {specs[0].num_heads} heads, hidden_size "
        f"{', '.join(str(s.hidden_size) for s in specs)}; {chosen.type}, lr {chosen.lr:g}, {device.type}, fp32, "
        f"{STEPS} steps on one batch of random tokens, mean of {REPEATS} seeds"
    )
    movements = {}
    for title, uses_mup in (("with muP", True), ("without", False)):
        movements[title] = measure(
            specs,
            lambda groups: build_optimizer(
                groups, chosen.type, lr=chosen.lr, betas=chosen.betas, eps=chosen.eps, momentum=chosen.momentum
            ),
            learning_rate=chosen.lr,
            weight_decay=chosen.weight_decay,
            rule=update_rule(chosen.type),
            uses_mup=uses_mup,
            seeds=range(config.training.seed, config.training.seed + REPEATS),
            device=device,
        )
        print(f"\n{title}: mean |change| of activations by hidden_size, and p in change ~ hidden_size^p")
        print(table(movements[title]), flush=True)
    is_independent, words = verdict(movements["with muP"], movements["without"])
    print(f"\n{words}\n")
    _write_down(run_folder(config), movements, is_independent, words)


def _write_down(folder: Path, movements: dict[str, Movement], is_independent: bool, words: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "is_width_independent": is_independent,
        "verdict": words,
        **{
            title.replace(" ", "_"): {"hidden_size": m.widths, "steps": m.steps, "changes": m.changes, "p": m.slopes()}
            for title, m in movements.items()
        },
    }
    atomic_write_text(folder / "coord_check.json", json.dumps(record, indent=1) + "\n")
    written = "coord_check.json"
    try:
        plot_movements(folder / "coord_check.png", {t: (m.widths, m.changes) for t, m in movements.items()})
    except ConfigError as error:
        print(f"no picture: {error}")
    else:
        written += " and coord_check.png"
    print(f"wrote {written} in {folder}")
