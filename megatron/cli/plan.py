"""deepy.py --plan: what a run costs and whether it fits, and with a number of GPUs and their memory, better layouts.

Starts nothing, never imports torch. Invariant: what it prints of a layout that a search found is what the same command
prints once those lines stand in the file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any, Literal

from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.config.merge import Setting
from megatron.config.plan import (
    Cluster,
    Hardware,
    configured,
    inference_plan_text,
    inference_plan_values,
    plan_text,
    plan_values,
    search_config,
    search_text,
    search_values,
)

# Ids of GPT-2, as of most vocabularies of English text.
USUAL_VOCABULARY = 50_257
Purpose = Literal["generate", "evaluate"]
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
# One process and no division: what any model that a search can divide loads as.
UNDIVIDED: dict[str, Any] = {
    "pipe_parallel_size": 1,
    "model_parallel_size": 1,
    "sequence_parallel": False,
    "zero_optimization.stage": 1,
    "train_micro_batch_size_per_gpu": None,
    "gradient_accumulation_steps": None,
    "global_num_gpus": None,
    "num_gpus": None,
    "num_nodes": -1,
    "hostfile": None,
}


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add --plan and what goes with it; --gpus-per-node, which it reads too, is one of --submit's flags."""
    flags = parser.add_argument_group("planning (nothing is started)")
    flags.add_argument(
        "--plan", action="store_true", help="print layout, parameters, memory, FLOPs, tokens and time of a run"
    )
    flags.add_argument("--gpus", type=int, metavar="N", help="plan for N GPUs")
    flags.add_argument(
        "--gpu-memory", metavar="SIZE", help="memory of one GPU, as 80GB or 80GiB: says what does not fit, and why"
    )
    flags.add_argument("--peak-tflops", type=float, metavar="X", help="peak of one GPU, to estimate the time")
    flags.add_argument("--json", action="store_true", help="for scripts: the plan, or with --dry-run the commands")


def check_plan_flags(options: argparse.Namespace) -> None:
    """Raises: ConfigError for a flag that needs --plan, or a number that cannot be."""
    given = {
        "--gpus N": options.gpus,
        "--gpu-memory SIZE": options.gpu_memory,
        "--peak-tflops X": options.peak_tflops,
    }
    if options.json and not options.plan and (options.submit or not options.dry_run):
        raise ConfigError("--json needs --plan, or --dry-run without --submit.")
    if not options.plan:
        alone = [name for name, value in given.items() if value is not None]
        if alone:
            hint = " For a run, set global_num_gpus or num_gpus." if alone[0] == "--gpus N" else ""
            raise ConfigError(f"{alone[0]} needs --plan.{hint}")
        return
    if options.submit:
        raise ConfigError("--plan starts nothing and --submit does. Give one of the two.")
    for name, value in (
        ("gpus", options.gpus),
        ("gpus-per-node", options.gpus_per_node),
        ("peak-tflops", options.peak_tflops),
    ):
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} {value:g}: a number above 0 is needed.")


def print_plan(options: argparse.Namespace, overrides: dict[str, Any], purpose: Purpose | None = None) -> int:
    """Print the plan, and with --gpus and --gpu-memory the best layouts. Returns 0; raises ConfigError.

    purpose: what the run does with a trained model, or None for training.
    """
    inference = purpose is not None
    if options.gpus is not None:
        overrides.setdefault("device", "cuda")
    memory = None if options.gpu_memory is None else parse_size(options.gpu_memory)
    hardware = Hardware(memory, options.peak_tflops)
    searches = options.gpus is not None and memory is not None and not inference
    _assume_vocabulary(options, overrides, inference)
    config, refusal = _as_configured(options, overrides, inference, searches)
    values: dict[str, Any] = {}
    texts: list[str] = []
    if config is not None and purpose is not None:
        values = inference_plan_values(config, purpose, hardware) if options.json else {}
        texts.append("" if options.json else inference_plan_text(config, purpose, hardware))
    elif config is not None:
        values = plan_values(config, hardware) if options.json else {}
        texts.append("" if options.json else plan_text(config, hardware))
    if searches:
        assert memory is not None
        cluster = _cluster(options, config)
        undivided = _undivided(options, overrides, config, refusal)
        found = search_config(undivided, options.gpus, memory, cluster)
        own = None if config is None else configured(config, found, cluster)
        values["search"] = search_values(found, own)
        if refusal is not None:
            values["refused"] = str(refusal).splitlines()
            texts.append(f"As configured, it cannot run on {options.gpus} GPUs:\n  {refusal}")
        texts.append(search_text(found, options.gpus, memory, cluster, own))
    print(json.dumps(values, indent=1) if options.json else "\n\n".join(texts))
    return 0


def _assume_vocabulary(options: argparse.Namespace, overrides: dict[str, Any], inference: bool) -> None:
    """Where the tokenizer's file is not there and nothing says its size: a usual one, with a note."""
    try:
        config = load(options.conf_file, overrides, conf_dir=options.conf_dir, planning=True, inference=inference)
    except ConfigError:
        return  # whoever needs it says why
    if config.tokenizer.padded_vocab_size is not None:
        return
    divisor = config.tokenizer.make_vocab_size_divisible_by * config.parallel.model_parallel_size
    rows = -(-USUAL_VOCABULARY // divisor) * divisor
    overrides["padded_vocab_size"] = Setting(rows, "assumed by --plan")
    print(
        f"note: {config.tokenizer.vocab_file} is not there, which knows the size of the vocabulary: {rows:,} rows are "
        "assumed. --set padded_vocab_size=N says how many.",
        file=sys.stderr,
    )


def parse_size(text: str) -> float:
    """Bytes of `80GB`, `80 GiB` or `80` (gigabytes). Raises: ConfigError for anything else."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = found.group(2).upper() if found else None
    if found is None or unit not in UNITS or float(found.group(1)) <= 0:
        raise ConfigError(f"--gpu-memory {text}: a size such as 80GB or 80GiB is needed.")
    # Nobody has a GPU of 80 bytes.
    return float(found.group(1)) * (UNITS["GB"] if unit == "" else UNITS[unit])


def _as_configured(
    options: argparse.Namespace, overrides: dict[str, Any], inference: bool, may_fail: bool
) -> tuple[Config | None, ConfigError | None]:
    """The configuration, or, where a search may mend it, why it does not load on so many GPUs."""
    try:
        config = load(
            options.conf_file,
            overrides,
            conf_dir=options.conf_dir,
            devices=options.gpus,
            planning=True,
            inference=inference,
        )
    except ConfigError as error:
        if not may_fail:
            raise
        return None, error
    return config, None


def _undivided(
    options: argparse.Namespace, overrides: dict[str, Any], config: Config | None, refusal: ConfigError | None
) -> Config:
    """The same model and global batch on one process. Raises: the refusal, if the layout is not what is wrong."""
    changes = {**overrides, **UNDIVIDED}
    try:
        changes["train_batch_size"] = (
            _sequences(options, overrides) if config is None else config.batch.train_batch_size
        )
        return load(options.conf_file, changes, conf_dir=options.conf_dir, devices=1, planning=True)
    except ConfigError:
        if refusal is not None:
            raise refusal from None
        raise


def _sequences(options: argparse.Namespace, overrides: dict[str, Any]) -> int:
    """The global batch of a file whose layout does not go with so many GPUs: as given, or of the replicas that fit."""
    least = load(options.conf_file, overrides, conf_dir=options.conf_dir, planning=True)
    sequences: int = least.batch.train_batch_size
    if not least.origin("train_batch_size").startswith("derived"):
        return sequences
    replicas = max(1, options.gpus // (least.parallel.num_stages * least.parallel.model_parallel_size))
    return sequences // least.parallel.data_parallel_size * replicas


def _cluster(options: argparse.Namespace, config: Config | None) -> Cluster:
    peak = options.peak_tflops or (config.observe.peak_theoretical_tflops if config is not None else None)
    cluster = Cluster(gpus_per_node=options.gpus_per_node or 8)
    return cluster if peak is None else Cluster(cluster.gpus_per_node, peak * 1e12)
