"""From a configuration to generated text: the one file here that sees the config.

Invariant: nothing is loaded before the prompts are known to be there, and the output file appears when all of them are
answered; what a stopped run had answered is in a file of another name.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron.common.errors import ConfigError, DataError, Stopped
from megatron.common.stop import StopSignals
from megatron.config import Config
from megatron.inference.decode import DecodeSettings
from megatron.inference.samples import Generator, read_prompts, require_writable, write_records
from megatron.inference.sampling import Sampling
from megatron.inference.session import Ranks, join_ranks, leave_ranks, load_trained
from megatron.model.from_config import model_spec
from megatron.tokenizer.setup import build_tokenizer

NOTICE = "stopping after this token; samples that are complete are kept"


def generate_from_config(config: Config, signals: StopSignals) -> int:
    """Do what the generation keys say. Collective over all ranks of the job.

    Raises: DataError, CheckpointError, ConfigError; no output is written then. Stopped after a signal: complete samples
    are in `<sample_output_file>.partial`.
    """
    section = config.generation
    if config.model.task != "causal_lm":
        raise ConfigError(
            f"task = {config.model.task}: this model predicts labels, not text. Score it with evaluate.py, or remove "
            "task and load the language model it was made from."
        )
    kind = section.text_gen_type or ("input-file" if section.sample_input_file else "unconditional")
    prompts = _prompts(config, kind)
    if kind != "interactive":
        require_writable(section.sample_output_file)
    tokenizer = build_tokenizer(config.tokenizer)
    ranks = join_ranks(config.parallel.model_parallel_size)
    try:
        folder = config.checkpoint.load or config.checkpoint.save
        precision = config.precision.precision or "fp32"
        settings = DecodeSettings(
            max_new_tokens=section.maximum_tokens,
            sampling=Sampling(section.temperature, section.top_k, section.top_p),
            eod_id=tokenizer.eod_id,
            seed=config.training.seed,
            use_cache=not section.recompute,
            keep_logits=section.return_logits,
        )
        model = load_trained(
            ranks,
            folder,
            config.checkpoint.iteration,
            tokenizer,
            precision,
            model_spec(config),
            config.checkpoint.upstream_gqa_layout,
        )
        generator = Generator(model, tokenizer, settings)
        if kind == "interactive":
            _talk(generator, ranks, section.prompt_end)
            return 0
        generator = dataclasses.replace(generator, asked=_asked_together(signals.asked, ranks))
        with signals.deferred(NOTICE):
            records, number = _run(generator, ranks, prompts)
            if number and ranks.groups.is_main:
                _keep_part(records, len(prompts), f"{section.sample_output_file}.partial", ranks)
        if number:
            raise Stopped(number)
        if ranks.groups.is_main:
            write_records(section.sample_output_file, records)
            tokens = sum(record["length"] for record in records)
            seconds = sum(record["duration_seconds"] for record in records)
            ranks.say(
                f"\n{len(records)} samples, {tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s per replica"
            )
            ranks.say(f"written: {section.sample_output_file}")
    finally:
        leave_ranks()
    return 0


def _prompts(config: Config, kind: str) -> list[str]:
    section = config.generation
    if kind == "input-file":
        if section.sample_input_file is None:
            raise DataError("text_gen_type: input-file needs sample_input_file: the file with the prompts (-i FILE)")
        return read_prompts(section.sample_input_file, section.prompt_end)
    return [""] * section.num_samples if kind == "unconditional" else []


def _asked_together(asked: Callable[[], int], ranks: Ranks) -> Callable[[], int]:
    """`asked` with one answer for the tensor-parallel ranks, which compute each token together."""
    group = ranks.groups.tp
    if group is None:
        return asked

    def together() -> int:
        number = torch.tensor(asked(), device=ranks.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX, group=group)
        return int(number)

    return together


def _keep_part(records: list[dict[str, Any]], num_prompts: int, path: str, ranks: Ranks) -> None:
    if not records:
        ranks.say(f"\nnone of {num_prompts} samples is complete; nothing is written")
        return
    write_records(path, records)
    ranks.say(f"\n{len(records)} of {num_prompts} samples are complete, and written: {path}")


def _run(generator: Generator, ranks: Ranks, prompts: list[str]) -> tuple[list[dict[str, Any]], int]:
    """(all records in order, on rank 0; the signal that stopped it, or 0, on every rank).

    Data-parallel replicas take every dp_size-th prompt.
    """
    groups = ranks.groups
    generator.tokenize(prompts)  # a prompt that is too long stops every rank, whoever it belongs to
    mine = list(range(groups.dp_rank, len(prompts), groups.dp_size))
    found: dict[int, dict[str, Any]] = {}

    def keep(index: int, record: dict[str, Any]) -> None:
        if index not in found:
            found[index] = record
            shown = record["message"] if record["text"] is None else record["text"]
            ranks.say(f"\n[{index + 1} of {len(prompts)}] {record['context']}{shown}")

    number = 0
    try:
        for place, record in generator.records([prompts[index] for index in mine], mine):
            keep(mine[place], record)
    except Stopped as stop:
        number = stop.number
    if groups.topology.world_size > 1:
        parts: list[Any] | None = [None] * groups.topology.world_size if groups.is_main else None
        dist.gather_object(dict(found), parts, dst=0)
        for part in parts or []:
            for index in sorted(part):
                keep(index, part[index])
        numbers: list[int] = [0] * groups.topology.world_size
        dist.all_gather_object(numbers, number)
        number = max(numbers)
    return [found[index] for index in sorted(found)], number


def _talk(generator: Generator, ranks: Ranks, prompt_end: str) -> None:
    """Prompt and answer in turns until the end of input; rank 0 reads, all compute."""
    groups = ranks.groups
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
                ranks.say(f"\n{record['message'] or ''}")
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
            lines += input("" if lines else "prompt> ") + "\n"
        except EOFError:
            return lines.strip() or None
        if prompt_end in lines:
            return lines.split(prompt_end)[0].strip()
