"""`tools/ckpts/convert_neox_to_hf.py`: a checkpoint, ours or upstream's -> a Hugging Face folder, checked first.

The architecture is the checkpoint's own (of an upstream one the configuration's, for it does not state it); the
configuration gives the tokenizer and the precision.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron.common.errors import CheckpointError, ConfigError
from megatron.config import Config, load
from megatron.convert.export import PRECISIONS, export_checkpoint, is_untouched
from megatron.convert.families import FAMILIES
from megatron.convert.foreign import AnyReader
from megatron.convert.lora import merged
from megatron.convert.open import open_weights
from megatron.convert.peft_adapter import export_adapter, export_prompt
from megatron.convert.soft_prompt import without_prompt
from megatron.convert.width_scaling import folded
from megatron.model.from_config import model_spec
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.setup import build_tokenizer

_ARCHITECTURES = {"auto": None, "neox": "gpt_neox"}
_OF_CONFIG = {"fp16": "fp16", "bfloat16": "bf16", "fp32": "fp32"}


def main(argv: list[str] | None = None) -> int:
    """Convert as the command line says. Raises: CheckpointError, ConfigError, DataError."""
    args = _parse(argv)
    config = load(args.config_file, planning=True) if args.config_file else None
    reader = open_weights(
        args.input_dir,
        None if config is None else model_spec(config).base,
        args.iteration,
        kinds=["weight"],
        grouped=None if config is None else config.checkpoint.upstream_gqa_layout,
    )
    model_type = _ARCHITECTURES.get(args.architecture, args.architecture)
    if args.adapter:
        return _export_adapter(reader, args, model_type)
    reader = folded(without_prompt(merged(reader), is_asked=args.without_soft_prompt))
    is_imported = is_untouched(reader)
    if config is None and not is_imported and (args.precision == "auto" or not args.no_save_tokenizer):
        raise ConfigError(
            "--config_file is missing: it says which tokenizer belongs to the model, and its precision. Give it, or "
            "give --precision and --no_save_tokenizer."
        )
    precision = args.precision
    if precision == "auto":
        # What the run used, not what `precision: auto` would mean on this machine. An imported model, back untouched.
        trained_in = reader.state.get("layout", {}).get("precision", config and config.precision.precision)
        precision = "stored" if is_imported else _OF_CONFIG[trained_in or "fp32"]
    print(f"{reader.folder} (step {reader.step}) -> {args.output_dir}, {precision}", flush=True)
    tokenizer = None if config is None or args.no_save_tokenizer else _tokenizer(config, reader.state.get("facts", {}))
    result = export_checkpoint(
        reader,
        args.output_dir,
        precision,
        model_type=model_type,
        tokenizer=tokenizer,
        pad_id=args.pad_token_id if args.pad_token_id >= 0 else None,
    )
    check = result.check
    print(f"checked: transformers' logits equal the native ones to {check.difference:.2g} (largest {check.scale:.3g})")
    if check.rounding:
        print(f"rounding the weights to {precision} moves a logit by {check.rounding:.2g} at most")
    for (major, minor), why in result.needs:
        print(f"needs transformers {major}.{minor} or later: {why}")
    print(f"written: {result.folder}, {result.architecture} ({result.tensor_bytes / 1e6:.1f} MB of weights)")
    return 0


def _export_adapter(reader: AnyReader, args: argparse.Namespace, model_type: str | None) -> int:
    precision = "fp32" if args.precision == "auto" else args.precision
    prompt = reader.state["model_spec"].get("soft_prompt")
    export = export_adapter if prompt is None else export_prompt
    written = export(reader, args.output_dir, dtype=PRECISIONS[precision], base=args.base_model, model_type=model_type)
    what = f"{written} {'modules' if prompt is None else 'virtual tokens'}, {precision}"
    print(f"{reader.folder} (step {reader.step}) -> {args.output_dir}: PEFT adapter, {what}")
    print("use: PeftModel.from_pretrained(base_model, folder), where base_model is the exported base of this run")
    return 0


def _tokenizer(config: Config, facts: dict[str, str]) -> Tokenizer:
    tokenizer = build_tokenizer(config.tokenizer)
    if facts.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise CheckpointError(
            f"the tokenizer of the configuration ({config.tokenizer.tokenizer_type}, {config.tokenizer.vocab_file}) is "
            "not the one that the model was trained with. Point vocab_file to that one, or use --no_save_tokenizer."
        )
    return tokenizer


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="convert_neox_to_hf.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--input_dir", type=Path, required=True, help="a global_stepN folder, or the folder that holds them (newest)")
    add("--config_file", type=Path, nargs="+", help="the YAML files that the model was trained with")
    add("--output_dir", type=Path, required=True, help="the folder to make; must not hold anything yet")
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help="auto: as the model was trained")
    add("--adapter", action="store_true", help="write what LoRA or prompt tuning has learnt alone, as a PEFT adapter")
    add("--without-soft-prompt", action="store_true", help="after prompt tuning: write the model without its prompt")
    add("--base-model", default="", help="with --adapter: the base model that adapter_config.json names")
    add("--no_save_tokenizer", action="store_true", help="write the model alone")
    add("--iteration", type=int, help="the step to convert, where --input_dir holds several")
    add("--pad-token-id", type=int, default=-1, help="pad_token_id of config.json; -1: the tokenizer's")
    add(
        "--vocab-is-hf-tokenizer",
        action="store_true",
        help="accepted for compatibility: what vocab_file is, is found out from the file",
    )
    add("--debug", action="store_true", help="show tracebacks")
    add(
        "--architecture",
        choices=["auto", "neox", *FAMILIES],
        default="auto",
        help="the Hugging Face architecture to write; auto: what the model is",
    )
    return parser.parse_args(argv)
