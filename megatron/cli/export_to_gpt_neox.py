"""`tools/ckpts/export_to_gpt_neox.py`: a checkpoint -> upstream GPT-NeoX's own layout, at any tensor-parallel size.

Reads native checkpoints, and upstream's too: given one of those it splits or merges (as merge20b.py does for the 20B).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.config import load
from megatron.convert.export import PRECISIONS, model_spec
from megatron.convert.lora import merged
from megatron.convert.neox_export import export_neox
from megatron.convert.open import open_weights
from megatron.convert.soft_prompt import without_prompt
from megatron.convert.width_scaling import folded
from megatron.model.from_config import model_spec as spec_of_config


def main(argv: list[str] | None = None) -> int:
    """Convert as the command line says. Raises: CheckpointError, ConfigError."""
    args = _parse(argv)
    config = load([args.config_file], planning=True) if args.config_file else None
    reader = open_weights(
        args.input_dir,
        None if config is None else spec_of_config(config).base,
        args.iteration,
        kinds=["weight"],
        grouped=None if config is None else config.checkpoint.upstream_gqa_layout,
    )
    stored, reader = model_spec(reader), folded(without_prompt(merged(reader), is_asked=args.without_soft_prompt))
    configs = reader.source_files()
    if args.config_file:
        configs[args.config_file.name] = args.config_file.read_text()
    folder = export_neox(
        reader,
        model_spec(reader),
        args.output_dir,
        dtype=PRECISIONS[args.precision],
        tp_size=args.tp,
        with_layer_files=not args.no_pipeline,
        configs=configs,
    )
    print(f"{reader.folder} (step {reader.step}) -> {folder}, {args.precision}, model_parallel_size {args.tp}")
    print(f"read back and compared. For GPT-NeoX: load: {args.output_dir}, pipe_parallel_size: {_stages(args)}")
    if stored.mup is not None:
        head = "" if model_spec(reader).tied_head or not stored.tied_head else ", and set no_weight_tying: true"
        print(f"its multipliers are in the weights now: remove the mup keys from the YAML{head}")
    return 0


def _stages(args: argparse.Namespace) -> str:
    return "0" if args.no_pipeline else "1 or more"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export_to_gpt_neox.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="a global_stepN folder, or the folder that holds them (newest)")
    add("--output_dir", type=Path, required=True, help="global_stepN and latest are written here")
    add("--config_file", type=Path, help="the YAML of the model; put beside, and needed for an upstream checkpoint")
    add("--tp", type=int, default=1, help="model_parallel_size to write for")
    add("--no-pipeline", action="store_true", help="one file per rank, for pipe_parallel_size: 0; else one per layer")
    add("--precision", choices=list(PRECISIONS), default="fp32")
    add("--without-soft-prompt", action="store_true", help="after prompt tuning: write the model without its prompt")
    add("--iteration", type=int, help="the step to convert, where --input_dir holds several")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)
