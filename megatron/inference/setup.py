"""From a configuration to a model that generates: the one file here that sees the config.

Invariant: nothing is loaded before the prompts are known to be there, and nothing is written before all are answered.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint import open_checkpoint
from megatron.common.errors import CheckpointError, ConfigError, DataError
from megatron.config import Config
from megatron.inference.decode import DecodeSettings
from megatron.inference.load import load_model
from megatron.inference.samples import Generator, read_prompts, require_writable, write_records
from megatron.inference.sampling import Sampling
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from megatron.tokenizer.setup import build_tokenizer

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}


def generate_from_config(config: Config, step: int | None = None) -> int:
    """Do what the generation keys say. Collective over all ranks of the job.

    step: the checkpoint to load (unset: the key `iteration`, else the newest).
    Raises: DataError, CheckpointError, ConfigError; no output is written then.
    """
    section = config.generation
    kind = section.text_gen_type or ("input-file" if section.sample_input_file else "unconditional")
    prompts = _prompts(config, kind)
    if kind != "interactive":
        require_writable(section.sample_output_file)
    device = _device()
    groups = _join(config.parallel.model_parallel_size, device)
    try:
        say: Callable[[str], None] = print if groups.is_main else lambda line: None
        generator = _generator(config, step, groups, device, say)
        if kind == "interactive":
            _talk(generator, groups, section.prompt_end)
            return 0
        records = _run(generator, groups, prompts, say)
        if groups.is_main:
            write_records(section.sample_output_file, records)
            tokens = sum(record["length"] for record in records)
            seconds = sum(record["duration_seconds"] for record in records)
            say(f"{len(records)} samples, {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s")
            say(f"written: {section.sample_output_file}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _prompts(config: Config, kind: str) -> list[str]:
    section = config.generation
    if kind == "input-file":
        if section.sample_input_file is None:
            raise DataError("text_gen_type: input-file needs sample_input_file: the file with the prompts (-i FILE)")
        return read_prompts(section.sample_input_file, section.prompt_end)
    return [""] * section.num_samples if kind == "unconditional" else []


def _generator(
    config: Config, step: int | None, groups: ProcessGroups, device: torch.device, say: Callable[[str], None]
) -> Generator:
    section, folder = config.generation, config.checkpoint.load or config.checkpoint.save
    if folder is None:
        raise ConfigError("neither load nor save is set: say where the checkpoints are, for example load: checkpoints")
    tokenizer = build_tokenizer(config.tokenizer)
    reader = open_checkpoint(
        folder,
        config.checkpoint.iteration if step is None else step,
        kinds=["weight"],
        part=groups.global_rank,
        parts=groups.topology.world_size,
        agree=lambda ok: _agree(ok, groups, device),
        report=say,
    )
    if reader.state.get("facts", {}).get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise CheckpointError(
            f"{reader.folder} was trained with another tokenizer than vocab_file = {config.tokenizer.vocab_file} "
            f"({config.tokenizer.tokenizer_type}). Point vocab_file to the tokenizer of that run."
        )
    dtype = _DTYPES[config.precision.precision or "fp32"]
    if dtype == torch.float16 and device.type == "cpu":
        say("fp16 was asked for; on the CPU fp32 is used instead")
        dtype = torch.float32
    model = load_model(reader, groups, dtype=dtype, device=device)
    say(f"{reader.folder} (step {reader.step}), {str(dtype).removeprefix('torch.')} on {device}, {groups.topology}")
    return Generator(
        model,
        tokenizer,
        DecodeSettings(
            max_new_tokens=section.maximum_tokens,
            sampling=Sampling(section.temperature, section.top_k, section.top_p),
            eod_id=tokenizer.eod_id,
            seed=config.training.seed,
            use_cache=not section.recompute,
            keep_logits=section.return_logits,
        ),
    )


def _run(
    generator: Generator, groups: ProcessGroups, prompts: list[str], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All records in order on rank 0; data-parallel replicas take every dp_size-th prompt."""
    generator.tokenize(prompts)  # a prompt that is too long stops every rank, whoever it belongs to
    mine = list(range(groups.dp_rank, len(prompts), groups.dp_size))
    found: dict[int, dict[str, Any]] = {}
    for place, record in generator.records([prompts[index] for index in mine], mine):
        found[mine[place]] = record
        say(f"\n[{mine[place] + 1} of {len(prompts)}] {record['context']}{record['text'] or record['message']}")
    if groups.topology.world_size > 1:
        parts: list[Any] | None = [None] * groups.topology.world_size if groups.is_main else None
        dist.gather_object(found, parts, dst=0)
        for part in parts or []:
            found |= part
    return [found[index] for index in sorted(found)]


def _talk(generator: Generator, groups: ProcessGroups, prompt_end: str) -> None:
    """Prompt and answer in turns until the end of input; rank 0 reads, all compute."""
    if groups.dp_size > 1:
        raise ConfigError(
            "text_gen_type: interactive runs on one replica. Start it with model_parallel_size processes."
        )
    number = 0
    while True:
        box = [_ask(prompt_end) if groups.is_main else None]
        if groups.tp is not None:
            dist.broadcast_object_list(box, src=0)
        if box[0] is None:
            return
        try:
            for _, record in generator.records([box[0]], [number], _show if groups.is_main else None):
                if groups.is_main:
                    print(f"\n{record['message']}" if record["message"] else "", flush=True)
        except DataError as error:
            if groups.is_main:
                print(f"error: {error}", file=sys.stderr)
        number += 1


def _show(index: int, text: str) -> None:
    print(text, end="", flush=True)


def _ask(prompt_end: str) -> str | None:
    """The next prompt of the terminal, up to `prompt_end`; None at the end of input."""
    lines = ""
    while True:
        try:
            lines += input("prompt> " if not lines else "") + "\n"
        except EOFError:
            return lines.strip() or None
        if prompt_end in lines:
            return lines.split(prompt_end)[0].strip()


def _device() -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _join(tp_size: int, device: torch.device) -> ProcessGroups:
    """The groups of this job: alone without tensor parallelism, else tp as configured and the rest replicas."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return ProcessGroups.single()
    if world_size % tp_size:
        raise ConfigError(
            f"{world_size} processes do not divide by model_parallel_size = {tp_size}. Start a multiple of it, or one."
        )
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return ProcessGroups.build(Topology(tp_size=tp_size, dp_size=world_size // tp_size))


def _agree(ok: bool, groups: ProcessGroups, device: torch.device) -> bool:
    if groups.topology.world_size == 1:
        return ok
    verdict = torch.tensor(int(ok), device=device)
    dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
    return bool(verdict.item())
