"""Low-rank updates, or a soft prompt, as a PEFT adapter: a folder that `peft.PeftModel.from_pretrained(base, folder)`
puts on its base.

One module of transformers may hold what are several of ours (queries, keys and values in one matrix) and the other way
round. Where several of our updates fall into one matrix, theirs stands for the sum of them: its rank is the sum of
the ranks, its first matrix all of ours below each other, its second one block beside another.
Invariant: B A of the adapter is the rearranged sum of ours, element by element.
Source: the file names and keys of PEFT 0.7 to 0.21.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron.common.errors import CheckpointError
from megatron.common.files import atomic_write_text
from megatron.convert.export import choose_family
from megatron.convert.family import Family
from megatron.convert.foreign import AnyReader
from megatron.convert.publish import new_folder, require_free
from megatron.convert.recipes import Group
from megatron.convert.soft_prompt import without_prompt
from megatron.convert.width_scaling import folded
from megatron.model.soft_prompt import SOFT_PROMPT_WEIGHT
from megatron.model.spec import ModelSpec

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "question_answering": "QUESTION_ANS",
}
# A width that no model has, to tell apart the two sides of a matrix.
_ODD_WIDTH = 7919


def export_adapter(
    reader: AnyReader, output: Path, *, dtype: torch.dtype, base: str = "", model_type: str | None = None
) -> int:
    """Write the updates of a checkpoint as an adapter; the number of modules is returned.

    base: what adapter_config.json names as the base model. model_type: the architecture of the base model; None
    chooses.
    Raises: CheckpointError if there are no updates, or `output` exists and is not empty.
    """
    spec = ModelSpec.from_dict(reader.state["model_spec"])
    if spec.lora is None:
        raise CheckpointError(
            f"{reader.folder} has no low-rank updates and no soft prompt. Export the model without --adapter."
        )
    if spec.mup is not None:
        raise CheckpointError(
            f"{reader.folder} was trained with use_mup: its multipliers go into the weights of an exported model, "
            "which updates beside them do not see. Export the merged model without --adapter."
        )
    family = choose_family(reader, _without_updates(spec), model_type)
    require_free(output, "--output_dir")
    tensors, ranks = _tensors(reader, spec, family, dtype)
    _write(output, tensors, _config(spec, family, ranks, base))
    return len(ranks)


def export_prompt(
    reader: AnyReader, output: Path, *, dtype: torch.dtype, base: str = "", model_type: str | None = None
) -> int:
    """Write the soft prompt of a checkpoint, and a head of labels, as an adapter; the number of tokens is returned.

    Arguments as of `export_adapter`. PEFT puts the prompt where this program does: behind what scales word embeddings,
    before what adds positions.
    Raises: CheckpointError if there is no prompt, or low-rank updates beside it, or `output` exists and is not empty.
    """
    spec = ModelSpec.from_dict(reader.state["model_spec"])
    if spec.soft_prompt is None:
        raise CheckpointError(f"{reader.folder} has no soft prompt. Export the model without --adapter.")
    if spec.lora is not None:
        raise CheckpointError(
            f"{reader.folder} has low-rank updates and a soft prompt, which are no one adapter of PEFT. Merge the "
            "updates with tools/ckpts/merge_lora.py first; then export that model with --without-soft-prompt, and the "
            "prompt, made for it, with --adapter."
        )
    # The head, and who computes the model, are those of what is exported without the prompt.
    plain = folded(without_prompt(reader, is_asked=True))
    plain_spec = ModelSpec.from_dict(plain.state["model_spec"])
    family = choose_family(plain, plain_spec, model_type)
    require_free(output, "--output_dir")
    prompt = reader.read(SOFT_PROMPT_WEIGHT, dtype=dtype)
    _write(
        output,
        {"prompt_embeddings": prompt, **_head(plain, plain_spec, family, dtype, "base_model")},
        {
            "peft_type": "PROMPT_TUNING",
            "task_type": _TASK_TYPES[spec.task],
            "base_model_name_or_path": base,
            "inference_mode": True,
            "num_virtual_tokens": spec.num_virtual_tokens,
            "token_dim": spec.hidden_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": spec.num_heads,
            "num_layers": spec.num_layers,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
        },
    )
    return spec.num_virtual_tokens


def _write(output: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Make the folder appear with one rename."""
    with new_folder(output, "--output_dir") as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        atomic_write_text(temporary / CONFIG, json.dumps(config, indent=2) + "\n")


def _without_updates(spec: ModelSpec) -> ModelSpec:
    return ModelSpec.from_dict({**spec.to_dict(), "lora": None})


def _tensors(
    reader: AnyReader, spec: ModelSpec, family: Family, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """(tensors of the file, rank of each updated module)."""
    updated, tensors, ranks = set(reader.names()), dict[str, torch.Tensor](), dict[str, int]()
    for group in family.all_groups(_without_updates(spec)):
        own = [name.removesuffix(".weight") for name in group.ours]
        layers = [layer for layer in own if f"{layer}.lora.a" in updated]
        if not layers:
            continue
        first = torch.cat([reader.read(f"{layer}.lora.a", dtype=torch.float32) for layer in layers])
        parts = _second_matrices(reader, group, layers, len(first))
        for theirs, second in zip(group.theirs, parts, strict=True):
            module = theirs.removesuffix(".weight")
            ranks[module] = len(first)
            stem = f"base_model.model.{module}"
            tensors[f"{stem}.lora_A.weight"] = first.to(dtype).clone()
            tensors[f"{stem}.lora_B.weight"] = second.to(dtype).contiguous()
    return tensors | _head(reader, spec, family, dtype, "base_model.model"), ranks


def _head(
    reader: AnyReader, spec: ModelSpec, family: Family, dtype: torch.dtype, prefix: str
) -> dict[str, torch.Tensor]:
    """The tensors of a head of labels, which is trained whole."""
    if spec.task == "causal_lm":
        return {}
    groups = family.all_groups(spec)[-1 - spec.head_bias :]
    return {f"{prefix}.{group.theirs[0]}": reader.read(group.ours[0], dtype=dtype) for group in groups}


def _second_matrices(reader: AnyReader, group: Group, layers: list[str], width: int) -> list[torch.Tensor]:
    """The second matrix of each of the group's tensors: rows as the recipe moves them, columns of all updates."""
    wide, begin = [], 0
    for name in group.ours:
        layer = name.removesuffix(".weight")
        rows = reader.spec(name).logical_shape[0]
        block = torch.zeros((rows, width))
        if layer in layers:
            second = reader.read(f"{layer}.lora.b", dtype=torch.float32)
            block[:, begin : begin + second.shape[1]] = second
            begin += second.shape[1]
        wide.append(block)
    moved = group.recipe.to_hf(wide)
    shapes = group.recipe.to_hf([torch.empty((len(block), _ODD_WIDTH), device="meta") for block in wide])
    # GPT-2's matrices are [in, out]; an adapter's second matrix is [out, rank] whatever it is put on.
    return [part if shape.shape[1] == _ODD_WIDTH else part.t() for part, shape in zip(moved, shapes, strict=True)]


def _config(spec: ModelSpec, family: Family, ranks: dict[str, int], base: str) -> dict[str, Any]:
    assert spec.lora is not None
    usual, scale = spec.lora.rank, spec.lora.alpha / spec.lora.rank
    unusual = {module: rank for module, rank in ranks.items() if rank != usual}
    # Of each name the part that tells the module within its layer.
    targets = sorted({module.rpartition(".")[2] for module in ranks})
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[spec.task],
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": spec.lora.alpha,
        "lora_dropout": spec.lora.dropout,
        "target_modules": targets if _are_all(targets, ranks, spec, family) else sorted(ranks),
        "rank_pattern": unusual,
        "alpha_pattern": {module: scale * rank for module, rank in unusual.items()},
        "bias": "none",
        "fan_in_fan_out": family.model_type == "gpt2",
        "modules_to_save": None if spec.task == "causal_lm" else [family.heads[spec.task][1]],
    }


def _are_all(targets: list[str], ranks: dict[str, int], spec: ModelSpec, family: Family) -> bool:
    """Whether the last parts of the names mean these modules and no others."""
    modules = {
        theirs.removesuffix(".weight")
        for group in family.all_groups(_without_updates(spec))
        for theirs in group.theirs
        if theirs.endswith(".weight")
    }
    return {module for module in modules if module.rpartition(".")[2] in targets} == set(ranks)
