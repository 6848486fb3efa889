"""From a configuration to scores of the model it trained: the one file here that sees the config.

Invariant: no model is loaded before the tasks are known to be there, and no optimizer is ever built.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.checkpoint import local_folder
from megatron.common.errors import ConfigError
from megatron.common.stop import StopSignals
from megatron.config import Config
from megatron.convert.foreign import AnyReader
from megatron.convert.open import require_weights
from megatron.data.indexed import IndexedDataset
from megatron.data.labelled import require_label_names
from megatron.data.token_dataset import open_labels
from megatron.engine.modules import LossModule
from megatron.engine.train_engine import TrainEngine
from megatron.evaluation import results as views
from megatron.evaluation.labelled import evaluate_labelled
from megatron.evaluation.run import evaluate_tasks, load_tasks
from megatron.inference.session import join_ranks, leave_ranks, load_trained
from megatron.model.from_config import model_spec
from megatron.observe.setup import build_recorder
from megatron.tokenizer.setup import build_tokenizer

NOTICE = "stopping after this batch; there will be no results"


def evaluate_from_config(config: Config, signals: StopSignals) -> int:
    """Run `eval_tasks` on the checkpoint in `load`, print a table and write the results. Collective over all ranks.

    Raises: ConfigError, DataError, CheckpointError, or Stopped after a signal; nothing is written then.
    """
    names, step = config.evaluation.eval_tasks, config.checkpoint.iteration
    folder = config.checkpoint.load or config.checkpoint.save
    is_labelled = config.model.task != "causal_lm"
    if is_labelled and names:
        raise ConfigError(
            f"eval_tasks are for language models; this one is for {config.model.task}: remove eval_tasks, and its "
            "labelled test data (else the validation data) is scored"
        )
    if not names and not is_labelled:
        raise ConfigError("eval_tasks is not set: say what to run, for example --eval_tasks stdlib_completion")
    if folder is not None:
        require_weights(folder, step)  # a wrong folder shows before anything costs time
    tokenizer = build_tokenizer(config.tokenizer)
    ranks = join_ranks(config.parallel.model_parallel_size)
    opened: list[AnyReader] = []
    try:
        tasks = load_tasks(names, ranks.groups, ranks.device) if names else None
        labelled = _labelled_data(config) if is_labelled else {}
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
        label_prefixes = [str(labels.prefix) for _, labels in labelled.values()]
        for known, whose in ((model.spec.label_names, "the checkpoint"), (config.model.label_names, "label_names")):
            require_label_names(label_prefixes, known or (), config.model.task, whose)
        reader = opened[0]
        info = {
            "checkpoint": str(reader.folder),
            "step": reader.step,
            "model_num_parameters": sum(reader.spec(name).shard_numel(1) for name in reader.names()),
            "tokenizer": tokenizer.fingerprint,
        }
        batch_size = config.batch.train_micro_batch_size_per_gpu
        max_length = min(config.model.seq_length, model.spec.max_text_positions)
        results: dict[str, Any] | None
        if tasks is None:
            results = evaluate_labelled(model, labelled, batch_size=batch_size, max_length=max_length, info=info)
            results = results if ranks.groups.is_main else None
        else:
            with signals.deferred(NOTICE):
                results = evaluate_tasks(
                    model,
                    tokenizer,
                    tasks,
                    batch_size=batch_size,
                    max_length=max_length,
                    info=info,
                    asked=signals.asked,
                )
        if results is not None:
            _publish(config, results, reader.step)
    finally:
        leave_ranks()
    return 0


def _labelled_data(config: Config) -> dict[str, tuple[IndexedDataset, IndexedDataset]]:
    """Token and label files of the test set, or of the validation set where there is none, by prefix."""
    for part in ("test", "valid"):
        prefixes, labels = getattr(config.data, f"{part}_data_paths"), getattr(config.data, f"{part}_label_data_paths")
        if prefixes and labels:
            opened = {prefix: IndexedDataset(prefix) for prefix in prefixes}
            return {
                prefix: (tokens, open_labels(label, tokens))
                for (prefix, tokens), label in zip(opened.items(), labels, strict=True)
            }
    raise ConfigError(
        f"task = {config.model.task}: set test_data_paths and test_label_data_paths (or those of valid): there is "
        "nothing to score"
    )


def training_scorer(
    config: Config, engine: TrainEngine, asked: Callable[[], int] = lambda: 0
) -> Callable[[], dict[str, float]] | None:
    """What scores the model under training on `eval_tasks` at each validation, or None without the key. Collective.

    The scores are upstream's: `<task>_<metric>`; empty on all ranks but the first. asked: the reason for which this
    rank is to stop, or 0; what scores then raises Stopped on all ranks.
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
            asked=asked,
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
