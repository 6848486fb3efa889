"""`tools/ckpts/convert_hf_to_neox.py`: a Hugging Face folder -> a checkpoint and its YAML, checked before they appear.

The architecture is read from config.json; the checkpoint loads at any layout.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.common.errors import CheckpointError
from megatron.convert.export import PRECISIONS
from megatron.convert.import_hf import import_folder


def main(argv: list[str] | None = None) -> int:
    """Convert as the command line says. Raises: CheckpointError."""
    args = _parse(argv)
    if not args.hf_input.is_dir():
        raise CheckpointError(
            f"{args.hf_input} is no folder. --hf-input is a model's folder with config.json and its weight files; "
            "download a published one first (huggingface-cli download NAME --local-dir DIR)."
        )
    dtype = None if args.precision == "auto" else PRECISIONS[args.precision]
    print(f"{args.hf_input} -> {args.output}, {'types as stored' if dtype is None else args.precision}", flush=True)
    result = import_folder(args.hf_input, args.output, dtype=dtype, config_out=args.config_out)
    check, spec = result.check, result.spec
    print(f"checked: transformers' logits equal the native ones to {check.difference:.2g} (largest {check.scale:.3g})")
    if check.rounding:
        print(f"rounding the weights to {args.precision} moves a logit by {check.rounding:.2g} at most")
    print(
        f"written: {result.folder} ({result.tensor_bytes / 1e6:.1f} MB of weights, {spec.num_layers} layers of "
        f"{spec.hidden_size})"
    )
    print(f"written: {result.config}")
    for warning in result.warnings:
        print(f"warning: {warning}")
    print(f"go on:   ./deepy.py train.py {result.config} YOUR_DATA.yml   or   ./deepy.py generate.py {result.config}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert_hf_to_neox.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--hf-input", type=Path, required=True, help="the model's folder: config.json and safetensors files")
    add("--output", type=Path, required=True, help="the folder to make; must not hold anything yet")
    add("--config-out", type=Path, help="the YAML to write; OUTPUT/config.yml if not given")
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="auto: every tensor as it is stored")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)
