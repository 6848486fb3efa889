"""The ranks of a job that uses a trained model without training it, and that model on each of them.

Needs no DeepSpeed and, in one process, no process group. Invariant: all ranks load the same checkpoint, or all raise.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron.common.errors import CheckpointError, ConfigError
from megatron.convert.foreign import AnyReader
from megatron.convert.neox_layers import GroupedLayout
from megatron.convert.open import open_weights
from megatron.inference.load import load_model
from megatron.model.build import Transformer
from megatron.model.spec import ModelSpec
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from megatron.tokenizer.base import Tokenizer

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Ranks:
    """This rank's groups and device; `say` speaks on rank 0 only."""

    groups: ProcessGroups
    device: torch.device

    def say(self, line: str) -> None:
        """Print a line once for all ranks."""
        if self.groups.is_main:
            print(line, flush=True)

    def share(self, text: str) -> list[str]:
        """The texts of all ranks. Collective."""
        texts = [text] * self.groups.topology.world_size
        if len(texts) > 1:
            dist.all_gather_object(texts, text)
        return texts


def join_ranks(tp_size: int) -> Ranks:
    """Join the job that the environment names: tensor parallelism as configured, the rest replicas, no stages.

    One process alone holds the whole model, whatever `tp_size` says. Raises: ConfigError if the ranks do not divide.
    """
    device = torch.device("cpu")
    if os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Ranks(ProcessGroups.single(), device)
    if world_size % tp_size:
        raise ConfigError(
            f"{world_size} processes do not divide by model_parallel_size = {tp_size}. Start a multiple of it, or one."
        )
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(ProcessGroups.build(Topology(tp_size=tp_size, dp_size=world_size // tp_size)), device)


def leave_ranks() -> None:
    """Leave the job; silent where there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()


def load_trained(
    ranks: Ranks,
    folder: str | None,
    step: int | None,
    tokenizer: Tokenizer,
    precision: str,
    spec: ModelSpec | None = None,
    grouped: GroupedLayout | None = None,
    on_reader: Callable[[AnyReader], None] | None = None,
) -> Transformer:
    """The model of the newest whole checkpoint in `folder`, or of `step`. Collective.

    precision: fp32 | fp16 | bfloat16, as the run's. spec: the configured model, needed where the folder is of upstream
    GPT-NeoX, grouped: as in `open_neox`. on_reader: sees the chosen checkpoint.
    Raises: ConfigError without a folder; CheckpointError if nothing can be loaded, the tokenizer is another one, or the
    spec has a soft prompt or low-rank updates that the checkpoint does not.
    """
    if folder is None:
        raise ConfigError("neither load nor save is set: say where the checkpoints are, for example load: checkpoints")
    reader = open_weights(
        folder,
        None if spec is None else spec.base,
        step,
        kinds=["weight"],
        grouped=grouped,
        part=ranks.groups.global_rank,
        parts=ranks.groups.topology.world_size,
        share=ranks.share,
        report=ranks.say,
    )
    if spec is not None:
        _require_additions(reader, spec)
    trained_with = reader.state.get("facts", {}).get("tokenizer", tokenizer.fingerprint)
    if trained_with != tokenizer.fingerprint:
        files = ", ".join(map(str, tokenizer.source_files)) or type(tokenizer).__name__
        raise CheckpointError(
            f"{reader.folder} was trained with another tokenizer than {files}. Point vocab_file to the one of that run."
        )
    dtype = _DTYPES[precision]
    if dtype == torch.float16 and ranks.device.type == "cpu":
        ranks.say("fp16 was asked for; on the CPU fp32 is used instead")
        dtype = torch.float32
    model = load_model(reader, ranks.groups, dtype=dtype, device=ranks.device)
    where = f"{str(dtype).removeprefix('torch.')} on {ranks.device}, {ranks.groups.topology}"
    ranks.say(f"{reader.folder} (step {reader.step}), {where}")
    if on_reader is not None:
        on_reader(reader)
    return model


def _require_additions(reader: AnyReader, spec: ModelSpec) -> None:
    """What fine-tuning adds to a model and the configuration asks for is in the checkpoint."""
    saved = reader.state.get("model_spec", {})
    for field, name, keys in (
        ("soft_prompt", "soft prompt", "soft_prompt_tuning"),
        ("lora", "low-rank updates (LoRA)", "the lora keys"),
    ):
        if getattr(spec, field) is not None and saved.get(field) is None:
            raise CheckpointError(
                f"{reader.folder} has no {name}, the configuration asks for {keys}. Set load to the folder that the "
                f"fine-tuning run saved to, or remove {keys} to use the model as it was before."
            )
