"""From a configuration to scores of the model it trained: the one file here that sees the config.

Invariant: no model is loaded before the tasks are known to be there, and no optimizer is ever built.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.checkpoint import local_folder
from megatron.common.errors import ConfigError
from megatron.config import Config
from megatron.convert.foreign import AnyReader
from megatron.convert.open import require_weights
from megatron.engine.modules import LossModule
from megatron.engine.train_engine import TrainEngine
from megatron.evaluation import results as views
from megatron.evaluation.run import evaluate_tasks, load_tasks
from megatron.inference.session import join_ranks, leave_ranks, load_trained
from megatron.model.from_config import model_spec
from megatron.observe.setup import build_recorder
from megatron.tokenizer.setup import build_tokenizer


def evaluate_from_config(config: Config) -> int:
    """Run `eval_tasks` on the checkpoint in `load`, print a table and write the results. Collective over all ranks.

    Raises: ConfigError, DataError or CheckpointError; nothing is written then.
    """
    names, step = config.evaluation.eval_tasks, config.checkpoint.iteration
    folder = config.checkpoint.load or config.checkpoint.save
    if not names:
        raise ConfigError("eval_tasks is not set: say what to run, for example --eval_tasks stdlib_completion")
    if folder is not None:
        require_weights(folder, step)  # a wrong folder shows before anything costs time
    tokenizer = build_tokenizer(config.tokenizer)
    ranks = join_ranks(config.parallel.model_parallel_size)
    opened: list[AnyReader] = []
    try:
        tasks = load_tasks(names, ranks.groups, ranks.device)
        model = load_trained(
            ranks,
            folder,
            step,
            tokenizer,
            config.precision.precision,
            model_spec(config),
            config.checkpoint.upstream_gqa_layout,
            opened.append,
        )
        reader = opened[0]
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
        leave_ranks()
    return 0


def training_scorer(config: Config, engine: TrainEngine) -> Callable[[], dict[str, float]] | None:
    """What scores the model under training on `eval_tasks` at each validation, or None without the key. Collective.

    The scores are upstream's: `<task>_<metric>`; empty on all ranks but the first.
    Raises: as `load_tasks`, so that a wrong task name ends the run before its first step.
    """
    names = config.evaluation.eval_tasks
    if not names:
        return None
    assert isinstance(engine.module, LossModule), "the configuration's rules let no stages through"
    model, tokenizer = engine.module.model, build_tokenizer(config.tokenizer)
    tasks = load_tasks(names, engine.groups, engine.device)

    def score() -> dict[str, float]:
        results = evaluate_tasks(
            model,
            tokenizer,
            tasks,
            batch_size=config.batch.train_micro_batch_size_per_gpu,
            max_length=config.model.seq_length,
            is_quiet=True,
        )
        return {} if results is None else views.metrics(results)

    return score


def _publish(config: Config, results: dict[str, Any], step: int) -> None:
    print(views.table(results))
    path = views.write(results, config.evaluation.eval_results_prefix)
    run_dir = Path(config.observe.log_dir or local_folder(config.checkpoint.save) or "logs")
    recorder = build_recorder(config, run_dir, is_main_rank=True)
    recorder.record(step, {f"eval/{name}": value for name, value in views.metrics(results).items()})
    recorder.close()
    print(f"written: {path}")
