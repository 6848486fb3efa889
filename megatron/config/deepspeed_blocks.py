"""DeepSpeed's blocks checked name by name and type by type, without DeepSpeed.

The table (deepspeed_keys.json) is generated out of the pinned DeepSpeed by `megatron.engine.deepspeed_keys`. What
DeepSpeed knows and this engine cannot let it do is refused here, with the key to use in its stead. Invariant: what
passes is handed to DeepSpeed as it was written.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.config.draft import Draft, did_you_mean
from megatron.config.former_keys import GONE
from megatron.config.messages import show, unknown_name
from megatron.config.schema import FIELDS

TABLE = Path(__file__).with_name("deepspeed_keys.json")

# Keys of the schema that hold a DeepSpeed block as it is.
PLAIN_BLOCKS = ("data_types", "flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor")
TYPED_BLOCKS = ("zero_optimization", "fp16", "bf16")
# Names in these blocks that come from old files and never were DeepSpeed's.
OWN_NAMES = {"fp16": ("type", "fp16"), "zero_optimization": ("cpu_offload_params",)}

_FP32_MASTERS = "master weights and gradients are kept in fp32, which is what checkpoints hold"
_NOT_TRIED = "this engine does not support it"

# Dotted name -> (values that ask for nothing, why it is refused or what to use).
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "optimizer": ((), "the key optimizer says it. Move it there"),
    "scheduler": ((), "the learning rate is set by lr_decay_style, lr_decay_iters, min_lr and warmup. Use these keys"),
    "bfloat16": ((), "it is the old name of bf16. Use the key bf16"),
    "aio": ((), "it serves offloading to nvme, which needs an extension that DeepSpeed compiles. Offload to cpu"),
    "autotuning": (({"enabled": False},), "runs are not restarted to be tuned. `./deepy.py --plan` ranks layouts"),
    "compile": (({"deepcompile": False},), "torch_compile: true compiles the blocks. Use that key"),
    "data_efficiency": (
        ({"enabled": False},),
        "the order of samples follows from seed alone. Sort the data beforehand",
    ),
    "datastates_ckpt": ((), "checkpoints are written by the keys save and checkpoint_factor"),
    "disable_allgather": ((False,), "weights would no longer be the same on all ranks"),
    "expert_parallel": ((), _NOT_TRIED),
    "gradient_allreduce_op": (("mean",), "losses are averaged over the replicas. Raise optimizer.params.lr instead"),
    "hybrid_engine": (({"enabled": False},), "generate.py has an engine of its own"),
    "managed_gradient_accumulation": ((True,), "the engine counts micro-batches by it"),
    "pipeline.activation_checkpoint_interval": ((0,), "checkpoint_num_layers is the key for it"),
    "pipeline.partition": (("best",), "pipe_partition_method is the key for it"),
    "pipeline.seed_layers": ((False,), "every layer has a seed of its own that follows from seed"),
    "pipeline.stages": (("auto",), "pipe_parallel_size is the key for it"),
    "tensor_parallel": ((), "model_parallel_size is the key for it"),
    "torch_autocast": (({"enabled": False},), "precision is the key for it"),
    "use_data_before_expert_parallelism": ((False,), _NOT_TRIED),
    "weight_quantization": ((), "it serves DeepSpeed's inference engine only"),
    "zero_allow_untested_optimizer": ((True,), "the engine brings optimizers of its own"),
    "zero_force_ds_cpu_optimizer": ((False,), "it needs an extension that DeepSpeed compiles; torch's AdamW is used"),
    "comet.api_key": ((), "a file is no place for a secret. Export COMET_API_KEY"),
    "fp16.fp16_master_weights_and_grads": ((False,), _FP32_MASTERS),
    "bf16.bf16_master_weights_and_grads": ((False,), _FP32_MASTERS),
    "bf16.bf16_optimizer_states": ((False,), _FP32_MASTERS),
    "zero_optimization.zenflow": ((), _NOT_TRIED),
    "zero_optimization.zero_hpz_partition_size": ((1,), _NOT_TRIED),
    "zero_optimization.zero_quantized_weights": ((False,), _NOT_TRIED),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _NOT_TRIED),
    "zero_optimization.zero_quantized_gradients": ((False,), _NOT_TRIED),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "it needs an extension that DeepSpeed compiles"),
}

# Of the keys that DeepSpeed once had: what to do.
REMOVED = {
    "amp": "Use precision: bfloat16 or precision: fp16.",
    "curriculum_learning": "Train with a smaller seq_length first, then continue with load.",
    "elasticity": "A checkpoint goes on at any number of processes; set the batch keys.",
    "sparse_gradients": "Gradients of the embedding travel dense; remove it.",
}
_REMOVE = "Remove it."

# Of these no value at all is accepted; an editor does not offer them.
REFUSED_NAMES = frozenset(name for name, (values, _) in REFUSED.items() if not values)

# Likewise, but accepted with a warning: the result is the same without.
NO_EFFECT: dict[str, tuple[tuple[Any, ...], str]] = {
    "activation_checkpointing": ((), "recomputation is set by recompute_activations and checkpoint_num_layers"),
    "checkpoint": ((), "checkpoints are written by the keys save and checkpoint_factor, and load at any layout"),
    "dataloader_drop_last": ((False,), "DeepSpeed's data loader is not used"),
    "seq_parallel_communication_data_type": ((), "it serves Ulysses only. sequence_parallel is the key here"),
    "zero_optimization.elastic_checkpoint": ((False,), "checkpoints load at any layout as they are"),
    "zero_optimization.load_from_fp32_weights": ((True,), "master weights always come from the checkpoint's fp32 ones"),
    "zero_optimization.pipeline_loading_checkpoint": ((False,), "checkpoints are read by this project's own reader"),
}

_TYPE_WORDS = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "array": "a list",
    "object": "a block of `key: value` lines",
}
_DTYPES = ("fp32", "float32", "bf16", "bfloat16", "fp16", "float16")
_MORE_CHOICES = {f"data_types.{name}": _DTYPES for name in ("grad_accum_dtype", "param_dtype", "buffer_dtype")}


@functools.cache
def table() -> Mapping[str, Any]:
    """What the pinned DeepSpeed accepts; its form is described at megatron.engine.deepspeed_keys.deepspeed_keys."""
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


def _gone() -> str:
    return f"DeepSpeed {table()['deepspeed']} no longer has it."


def check_deepspeed_blocks(draft: Draft) -> None:
    """Every name in a DeepSpeed block, its type, and whether the engine can let DeepSpeed do it."""
    keys = table()["keys"]
    for name in PLAIN_BLOCKS:
        if name not in draft.failed and draft[name] is not None:
            _check(draft, name, name, draft[name], keys[name])
    for name in TYPED_BLOCKS:
        if name not in draft.failed and draft[name] is not None:
            given = draft[name].model_dump(exclude_unset=True)
            content = {key: value for key, value in given.items() if key not in OWN_NAMES.get(name, ())}
            _check(draft, name, name, content, keys[name])
    _check_extra_args(draft, keys)


def _check_extra_args(draft: Draft, keys: Mapping[str, Any]) -> None:
    """The names of deepspeed_extra_args: DeepSpeed's. (Those with a key of their own were moved there before.)"""
    for name, value in (draft["deepspeed_extra_args"] or {}).items():
        place = f"deepspeed_extra_args.{name}"
        if name in FIELDS and name not in REFUSED:
            draft.problem(place, f"{place} has a key of its own. Move it out of the block, to {name}.")
        elif name in GONE:
            draft.problem(place, f"{place}: {GONE[name]}.")
        elif name in table()["removed"]:
            if not (value is False or value is None or (isinstance(value, dict) and value.get("enabled") is False)):
                draft.problem(place, f"{place}: {_gone()} {REMOVED.get(name, _REMOVE)}")
        elif name not in keys:
            draft.problem(
                place,
                f"unknown key {name} in deepspeed_extra_args: DeepSpeed {table()['deepspeed']} has none of this name."
                f"{did_you_mean(name, [*keys, *FIELDS])}",
            )
        else:
            _check(draft, place, name, value, keys[name])


def _check(draft: Draft, place: str, path: str, value: Any, entry: Mapping[str, Any]) -> None:
    """One value against its entry of the table. place: as the user reaches it; path: as DeepSpeed calls it."""
    neutral, reason = REFUSED.get(path, (None, ""))
    if neutral is not None:
        if value is not None and value not in neutral:
            draft.problem(place, f"{place} = {show(value)}: {reason}.")
        return
    if path in NO_EFFECT:
        idle, reason = NO_EFFECT[path]
        if value is not None and value not in idle:
            draft.warn(place, f"{place}: no effect here, {reason}")
    types = entry.get("types")
    if types and not any(_is(value, kind) for kind in types):
        words = [_TYPE_WORDS[kind] for kind in types if kind in _TYPE_WORDS]
        draft.problem(place, f"{place} = {show(value)} must be {' or '.join(words)}.")
        return
    choices = entry.get("choices") or _MORE_CHOICES.get(path)
    if choices and value is not None and value not in choices:
        shown = ", ".join(dict.fromkeys(str(choice) for choice in choices))
        draft.problem(place, f"{place} = {show(value)} is not one of {shown}.{did_you_mean(str(value), choices)}")
    for name, word in (("minimum", "at least"), ("above", "above")):
        bound = entry.get(name)
        if bound is not None and _is(value, "number") and (value < bound or (name == "above" and value == bound)):
            draft.problem(place, f"{place} = {show(value)} must be {word} {bound:g}.")
    known = entry.get("keys")
    if known is None or not isinstance(value, dict):
        return
    for name, inner in value.items():
        if name in known:
            _check(draft, f"{place}.{name}", f"{path}.{name}", inner, known[name])
        elif path == "zero_optimization" and name in table()["removed_zero"]:
            draft.problem(f"{place}.{name}", f"{place}.{name}: {_gone()} {_REMOVE}")
        else:
            draft.problem(f"{place}.{name}", unknown_name(str(name), place, known))


def _is(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or value == int(value))
    return isinstance(value, {"string": str, "array": list | tuple, "object": dict}[kind])
