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
from megatron.training.coordinate_check import measure, table, widened
from megatron.training.setup import run_folder

NUM_WIDTHS, NARROWEST_HEAD, MOST_LAYERS = 4, 8, 4


def run_in_place_of_training(config: Config) -> bool:
    """Do what save_base_shapes or coord_check asks for; False if neither does."""
    is_first = os.environ.get("RANK", "0") == "0"
    if config.width.save_base_shapes and is_first:
        save_base_shapes(config)
    if config.width.coord_check and is_first:
        check_coordinates(config)
    return config.width.ends_the_run


def save_base_shapes(config: Config) -> None:
    """Write the widths of the configuration's model to base_shapes_file."""
    model, file = config.model, config.width.base_shapes_file
    assert file is not None
    shapes = BaseShapes.model_validate({name: getattr(model, name) for name in BaseShapes.model_fields})
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(file, json.dumps(shapes.model_dump(), indent=1) + "\n")
    print(f"wrote {file}: {', '.join(f'{name} {value}' for name, value in shapes.model_dump().items())}")


def check_coordinates(config: Config) -> None:
    """Print how far activations move at several widths, with muP and without, and draw it."""
    chosen, device = config.optimizer, local_device(config.launcher.device)
    spec = model_spec(config)
    specs = [
        widened(spec, NARROWEST_HEAD * config.width.mup_width_scale**place, min(spec.num_layers, MOST_LAYERS))
        for place in range(NUM_WIDTHS)
    ]
    print(
        f"coordinate check: {specs[0].num_layers} layers, {spec.num_heads} heads, hidden_size "
        f"{', '.join(str(s.hidden_size) for s in specs)}; {chosen.type}, lr {chosen.lr:g}, {device.type}, fp32, one "
        "batch of random tokens"
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
            seed=config.training.seed,
            device=device,
        )
        print(f"\n{title}: mean |change| of activations after {movements[title].steps} steps, by hidden_size")
        print(table(movements[title]), flush=True)
    picture = run_folder(config) / "coord_check.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    try:
        plot_movements(picture, {title: (m.widths, m.changes) for title, m in movements.items()})
    except ConfigError as error:
        print(f"no picture: {error}")
    else:
        print(f"\nwrote {picture}")
