"""`tools/ckpts/merge_lora.py`: a checkpoint with low-rank updates (LoRA) -> a checkpoint of the plain model.

The result holds weights only: train on from it with finetune: true, or generate, evaluate and export.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.checkpoint import Piece, open_checkpoint, save
from megatron.common.errors import CheckpointError
from megatron.convert.foreign import ORIGIN
from megatron.convert.lora import merged
from megatron.model.build import vocabulary_parameters
from megatron.model.spec import ModelSpec


def main(argv: list[str] | None = None) -> int:
    """Convert as the command line says. Raises: CheckpointError."""
    parser = argparse.ArgumentParser(prog="merge_lora.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input_dir", type=Path, required=True, help="a global_stepN folder, or the folder above it")
    parser.add_argument("--output_dir", type=Path, required=True, help="where global_stepN of the plain model goes")
    parser.add_argument("--iteration", type=int, help="the step to merge, where --input_dir holds several")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    reader = open_checkpoint(args.input_dir, args.iteration, kinds=["weight"])
    plain = merged(reader)
    if plain is reader:
        raise CheckpointError(f"{reader.folder} has no low-rank updates: there is nothing to merge")
    if (args.output_dir / f"global_step{reader.step}").exists():
        raise CheckpointError(f"{args.output_dir} holds step {reader.step} already. Choose another --output_dir.")
    spec = ModelSpec.from_dict(plain.state["model_spec"])
    pieces = (Piece.whole(name, "weight", plain.spec(name), plain.read(name)) for name in plain.names())
    saved = save(
        args.output_dir,
        reader.step,
        pieces,
        {key: plain.state[key] for key in ("model_spec", "facts", "layout", ORIGIN) if key in plain.state},
        source_files=list(reader.source_files().items()),
        used_rows=dict.fromkeys(vocabulary_parameters(spec), spec.vocab_size),
        expected_names=plain.names(),
    )
    print(f"{reader.folder} (step {reader.step}) -> {saved.folder}: {len(plain.names())} tensors, weights only")
    return 0
