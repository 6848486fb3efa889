"""From a configuration to scores of the model it trained: the one file here that sees the config.

Invariant: no model is loaded before the tasks are known to be there, and no optimizer is ever built.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.checkpoint import Reader, find, open_checkpoint
from megatron.common.errors import CheckpointError, ConfigError
from megatron.config import Config
from megatron.evaluation import results as views
from megatron.evaluation.run import evaluate_tasks, load_tasks
from megatron.inference.load import load_model
from megatron.observe.setup import build_recorder
from megatron.parallel.process_groups import ProcessGroups
from megatron.parallel.topology import Topology
from megatron.tokenizer.setup import build_tokenizer

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bfloat16": torch.bfloat16}


def evaluate_from_config(config: Config) -> int:
    """Run `eval_tasks` on the checkpoint in `load`, print a table and write the results. Collective over all ranks.

    Raises: ConfigError, DataError or CheckpointError; nothing is written then.
    """
    names, folder = config.evaluation.eval_tasks, config.checkpoint.load or config.checkpoint.save
    if not names:
        raise ConfigError("eval_tasks is not set: say what to run, for example --eval_tasks stdlib_completion")
    if folder is None:
        raise ConfigError("neither load nor save is set: say where the checkpoints are, for example load: checkpoints")
    find(folder, config.checkpoint.iteration)  # a wrong folder shows before anything costs time
    tokenizer = build_tokenizer(config.tokenizer)
    device = _device()
    groups = _join(config.parallel.model_parallel_size, device)
    try:
        tasks = load_tasks(names, groups, device)
        reader = _open(config, folder, groups, device)
        if reader.state.get("facts", {}).get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
            raise CheckpointError(
                f"{reader.folder} was trained with another tokenizer than {config.tokenizer.tokenizer_type} with "
                f"vocab_file {config.tokenizer.vocab_file}. Point vocab_file to the tokenizer of that run."
            )
        dtype = _dtype(config, device, groups)
        model = load_model(reader, groups, dtype=dtype, device=device)
        _say(groups, f"{reader.folder} (step {reader.step}), {str(dtype)[6:]} on {device}, {groups.topology}")
        results = evaluate_tasks(
            model,
            tokenizer,
            tasks,
            batch_size=config.batch.train_micro_batch_size_per_gpu,
            max_length=config.model.seq_length,
            info={
                "checkpoint": str(reader.folder),
                "step": reader.step,
                "model_num_parameters": sum(reader.spec(name).shard_numel(1) for name in reader.names()),
                "tokenizer": tokenizer.fingerprint,
            },
        )
        if results is not None:
            _publish(config, results, reader.step)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _publish(config: Config, results: dict[str, Any], step: int) -> None:
    print(views.table(results))
    path = views.write(results, config.evaluation.eval_results_prefix)
    run_dir = Path(config.observe.log_dir or config.checkpoint.save or "logs")
    recorder = build_recorder(config, run_dir, is_main_rank=True)
    recorder.record(step, {f"eval/{name}": value for name, value in views.metrics(results).items()})
    recorder.close()
    print(f"written: {path}")


def _open(config: Config, folder: str, groups: ProcessGroups, device: torch.device) -> Reader:
    def agree(ok: bool) -> bool:
        if groups.topology.world_size == 1:
            return ok
        verdict = torch.tensor(int(ok), device=device)
        dist.all_reduce(verdict, op=dist.ReduceOp.MIN)
        return bool(verdict.item())

    return open_checkpoint(
        folder,
        config.checkpoint.iteration,
        kinds=["weight"],
        part=groups.global_rank,
        parts=groups.topology.world_size,
        agree=agree,
        report=lambda note: _say(groups, note),
    )


def _dtype(config: Config, device: torch.device, groups: ProcessGroups) -> torch.dtype:
    dtype = _DTYPES[config.precision.precision]
    if dtype == torch.float16 and device.type == "cpu":
        _say(groups, "fp16 was asked for; on the CPU fp32 is used instead")
        return torch.float32
    return dtype


def _device() -> torch.device:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _join(tp_size: int, device: torch.device) -> ProcessGroups:
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


def _say(groups: ProcessGroups, line: str) -> None:
    if groups.is_main:
        print(line, flush=True)
