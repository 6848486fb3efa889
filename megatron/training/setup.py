"""Build a `Run` from the configuration: the last place that sees it.

Invariant: the order of construction is the same on all ranks, because several steps are collective.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint import Retention, local_folder, location
from megatron.common.errors import ConfigError, DataError
from megatron.common.heartbeat import reach
from megatron.config import Config
from megatron.config.plan.flops import flops_per_token
from megatron.convert.foreign import ORIGIN
from megatron.data.assembly import Datasets
from megatron.data.loader import BatchLoader
from megatron.data.setup import build_datasets
from megatron.data.token_dataset import TokenDataset
from megatron.engine.distributed import main_rank_first, start_distributed
from megatron.engine.replicas import ReplicaCheck
from megatron.engine.setup import engine_options, topology
from megatron.engine.statistics import Statistics, StatisticsOptions
from megatron.engine.train_engine import TrainEngine
from megatron.model.build import parameter_names
from megatron.model.from_config import init_ids, model_spec
from megatron.model.lora import is_trained
from megatron.model.recompute import Recompute
from megatron.model.spec import ModelSpec
from megatron.model.width_scaling import lr_factor, update_rule
from megatron.observe.setup import build_recorder
from megatron.observe.throughput import Throughput, peak_flops
from megatron.optim.build import build_optimizer
from megatron.optim.parameter_groups import parameter_groups
from megatron.optim.schedule import LearningRateSchedule
from megatron.parallel.process_groups import ProcessGroups
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.setup import build_tokenizer
from megatron.training.characters import CharacterCount
from megatron.training.loop import Run
from megatron.training.plan import RunPlan, SaveSchedule
from megatron.training.profiling import StepProfiler
from megatron.training.reliability.anomaly import AnomalyOptions, AnomalyPolicy
from megatron.training.reliability.signals import StopRequest
from megatron.training.reliability.watchdog import start_watchdog
from megatron.training.reporting import Reporter
from megatron.training.resuming import (
    OPTIMIZER,
    TRAIN_DATA,
    LoadOptions,
    ScheduleSource,
    changed_settings,
    open_run,
    restore_run,
    resumed_schedule,
)
from megatron.training.saver import Saver
from megatron.training.saving import Position, SaveOptions


def build_run(config: Config, asked: Callable[[], int] = lambda: 0) -> Run:
    """Join the job, open the data, build model and optimizer, continue from a checkpoint if there is one. Collective.

    asked: the signal that asks this process to stop, or 0.

    Raises: ConfigError, DataError or CheckpointError for what the user can mend.
    """
    device = start_distributed(config.launcher.device)
    watchdog = start_watchdog(config.training.watchdog_timeout_s)
    try:
        run = _build(config, asked, device)
    except BaseException:
        if watchdog is not None:
            watchdog.stop()
        raise
    run.watchdog = watchdog
    return run


def _build(config: Config, asked: Callable[[], int], device: torch.device) -> Run:
    reach("building the run")
    groups = ProcessGroups.build(
        topology(config),
        sequence_parallel=config.parallel.sequence_parallel,
        sums_in_fp32=config.precision.fp32_allreduce,
    )
    tokenizer = build_tokenizer(config.tokenizer)
    _check_vocabulary(config, tokenizer)
    # So that index files are built once, and then mapped.
    with main_rank_first():
        datasets = build_datasets(config)
    if config.training.train_epochs is not None:
        config = config.with_train_iters(len(datasets.train or ()) // config.batch.train_batch_size)
    plan = run_plan(config)
    if datasets.train is None:
        raise DataError("the configuration leaves nothing to train on: train_iters is 0")
    train, valid, test = _loaders(config, groups, tokenizer, datasets)
    reporter = build_reporter(config, plan, groups, device)
    reporter.message(f"{groups.topology}, {config.precision.precision}, {device.type}: {describe(config)}")
    engine = build_engine(config, groups, device, init_ids(config, tokenizer))
    facts: dict[str, Any] = {
        TRAIN_DATA: {"fingerprint": datasets.train.fingerprint, **datasets.train.parts},
        "tokenizer": tokenizer.fingerprint,
        OPTIMIZER: config.optimizer.type,
    }
    facts |= {key: getattr(config.tuning, key) for key in ("train_parameters", "freeze_parameters")}
    position, schedule, origin = _continue(config, engine, facts, reporter)
    about = {"schedule": asdict(schedule), "config": config.to_upstream_dict(), **origin}
    saver = Saver(engine, save_options(config, facts, about), reporter.message)
    saver.check_folder()
    run = Run(
        engine, plan, schedule, train, valid, test, reporter, saver, position,
        stop=StopRequest(asked, limit_mins=config.training.exit_duration_in_mins),
    )  # fmt: skip
    run.anomalies = AnomalyPolicy(anomaly_options(config))
    _add_watchers(run, config, groups, tokenizer)
    if config.training.check_replicas:
        run.replicas = ReplicaCheck(engine, config.training.check_replicas)
    run.anomalies.restore(run.position.anomalies)
    reporter.start(run.position.step)
    return run


def _add_watchers(run: Run, config: Config, groups: ProcessGroups, tokenizer: Tokenizer) -> None:
    """What looks at the steps without changing them: statistics, the profiler, the count of characters. Collective."""
    observe = config.observe
    options = StatisticsOptions(
        param_norm=observe.log_param_norm,
        grad_norm=observe.log_grad_norm,
        grad_zeros=observe.log_grad_pct_zeros,
        optimizer_states=observe.log_optimizer_states,
        noise_scale_batches=observe.gradient_noise_scale_n_batches if observe.log_gradient_noise_scale else 0,
        offload_noise_scale=observe.gradient_noise_scale_cpu_offload,
    )
    if options.any:
        run.statistics = Statistics(run.engine, options, config.batch.train_batch_size)
    if observe.profile or observe.memory_profiling:
        folder = Path(observe.tensorboard_dir) if observe.tensorboard_dir else run_folder(config) / "profile"
        run.profiler = StepProfiler(
            groups.global_rank,
            observe.profile_step_start,
            observe.profile_step_stop,
            trace_folder=folder if observe.profile else None,
            memory_folder=Path(observe.memory_profiling_path or folder) if observe.memory_profiling else None,
            say=run.reporter.message,
        )
    if observe.char_level_ppl:
        run.characters = CharacterCount(tokenizer.decode, groups, run.engine.device)


def _continue(
    config: Config, engine: TrainEngine, facts: dict[str, Any], reporter: Reporter
) -> tuple[Position, LearningRateSchedule, dict[str, Any]]:
    """Where the run goes on from, by which schedule, and what its checkpoints are to say of the model's origin.

    What has changed since is said. Collective.
    """
    options, schedule, report = load_options(config), learning_rate_schedule(config), reporter.message
    reader = open_run(engine, options, report)
    if reader is None:
        return Position(), schedule, {}
    position = restore_run(engine, reader, options, facts, report)
    if not options.weights_only:
        source: ScheduleSource | None = "config" if config.schedule.override_lr_scheduler else None
        if config.schedule.use_checkpoint_lr_scheduler:
            source = "checkpoint"
        schedule = resumed_schedule(reader, schedule, source, report)
        changes = changed_settings(reader.state.get("config", {}), settings(config))
        if changes:
            report("changed since that checkpoint: " + "; ".join(changes))
    return position, schedule, {ORIGIN: reader.state[ORIGIN]} if ORIGIN in reader.state else {}


def settings(config: Config) -> dict[str, Any]:
    """The keys that shape the numbers of a run, by name: not where it runs, saves and logs, and not its schedule."""
    shaping = (
        config.parallel, config.batch, config.model, config.tokenizer, config.precision, config.optimizer,
        config.width, config.zero, config.training, config.data,
    )  # fmt: skip
    values = {name: value for section in shaping for name, value in section.model_dump(mode="json").items()}
    # Said with the schedule; the block holds what other keys hold as well.
    return {name: value for name, value in values.items() if name not in ("optimizer", "lr")}


def run_plan(config: Config) -> RunPlan:
    """When things happen. Raises: ConfigError if train_iters is missing."""
    training, checkpoint = config.training, config.checkpoint
    if training.train_iters is None:
        raise ConfigError(
            "train_iters is missing: say how many optimizer steps to train, for example train_iters: 1000"
        )
    saves = SaveSchedule(
        checkpoint.checkpoint_scale, checkpoint.checkpoint_factor, frozenset(checkpoint.extra_save_iters or ())
    )
    return RunPlan(
        train_iters=training.train_iters,
        global_batch_size=config.batch.train_batch_size,
        seq_length=config.model.seq_length,
        eval_interval=training.eval_interval,
        eval_iters=training.eval_iters,
        log_interval=config.observe.log_interval,
        exit_interval=training.exit_interval,
        saves=saves,
    )


def build_engine(
    config: Config, groups: ProcessGroups, device: torch.device, prompt_ids: tuple[int, ...] = ()
) -> TrainEngine:
    """Model, optimizer and DeepSpeed, with initial weights of the config's seed.

    prompt_ids: the words that a soft prompt starts from, one for each virtual token; none: it starts at random.
    """
    chosen, spec = config.optimizer, model_spec(config, prompt_ids)
    rule = update_rule(chosen.type)
    return TrainEngine(
        spec,
        groups,
        engine_options(config),
        lambda named: build_optimizer(
            parameter_groups(named, chosen.weight_decay, lambda name: lr_factor(name, spec, rule)),
            chosen.type,
            lr=chosen.lr,
            betas=chosen.betas,
            eps=chosen.eps,
            momentum=chosen.momentum,
        ),
        seed=config.training.seed,
        device=device,
        recompute=Recompute(config.training.recompute, config.training.checkpoint_num_layers),
        compile_blocks=config.training.torch_compile,
        is_trained=trained_parameters(config, spec),
    )


def trained_parameters(config: Config, spec: ModelSpec) -> Callable[[str], bool]:
    """Which parameters learn, by their names. Raises: ConfigError for a pattern that fits none, or if none is left."""
    train, freeze = config.tuning.train_parameters or [], config.tuning.freeze_parameters or []
    names = parameter_names(spec)
    for key, patterns in (("train_parameters", train), ("freeze_parameters", freeze)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise ConfigError(
                    f"{config.origin(key)}: {key}: {pattern!r} fits no parameter. Names are {names[0]}, "
                    f"{names[len(names) // 2]}, {names[-1]} and so on; * stands for anything."
                )
    if not any(is_trained(name, spec, train, freeze) for name in names):
        raise ConfigError("train_parameters and freeze_parameters leave nothing to train. Freeze less.")
    return lambda name: is_trained(name, spec, train, freeze)


def build_reporter(config: Config, plan: RunPlan, groups: ProcessGroups, device: torch.device) -> Reporter:
    """Log files, remote loggers and the progress display, on the ranks that have them."""
    peak = config.observe.peak_theoretical_tflops
    peak_flops_per_s = peak * 1e12 if peak else None
    if peak is None and device.type == "cuda":
        peak_flops_per_s = peak_flops(torch.cuda.get_device_name(device), config.precision.precision)
    throughput = Throughput(
        plan.tokens_per_step,
        plan.global_batch_size,
        groups.topology.world_size,
        flops_per_token=flops_per_token(config),
        peak_flops=peak_flops_per_s,
    )
    recorder = build_recorder(config, run_folder(config), groups.is_main)
    return Reporter(plan, recorder, throughput, is_main=groups.is_main)


def anomaly_options(config: Config) -> AnomalyOptions:
    """The anomaly_* keys."""
    training = config.training
    return AnomalyOptions(
        skips_in_a_row=training.anomaly_skips_in_a_row,
        skips_in_window=training.anomaly_skips_in_window,
        window=training.anomaly_window,
        loss_factor=training.anomaly_loss_factor,
        grad_norm_factor=training.anomaly_grad_norm_factor,
        rollbacks=training.anomaly_rollbacks,
        skip_data=training.anomaly_skip_data,
    )


def learning_rate_schedule(config: Config) -> LearningRateSchedule:
    """The schedule that the config describes."""
    schedule = config.schedule
    return LearningRateSchedule(
        lr=config.optimizer.lr,
        style=schedule.lr_decay_style,
        decay_iters=schedule.lr_decay_iters,
        min_lr=schedule.min_lr,
        warmup=schedule.warmup,
    )


def save_options(config: Config, facts: dict[str, Any], about: dict[str, Any]) -> SaveOptions:
    """Where, what and how to save, by the checkpoint keys. facts, about: as in `SaveOptions`."""
    checkpoint = config.checkpoint
    return SaveOptions(
        folder=location(checkpoint.save) if checkpoint.save else None,
        retention=Retention(
            checkpoint.keep_last_n_checkpoints,
            tuple(checkpoint.extra_save_iters or ()),
            checkpoint.keep_checkpoint_every,
        ),
        source_files=[(Path(source.path).name, source.text) for source in config.files],
        facts=facts,
        about=about,
        checks_forward=config.checkpoint.checkpoint_validation_with_forward_pass,
        with_rng=not checkpoint.no_save_rng,
        is_async=checkpoint.async_save,
        on_failure=checkpoint.on_save_failure,
    )


def load_options(config: Config) -> LoadOptions:
    """Where to continue from, by the checkpoint keys."""
    checkpoint = config.checkpoint
    return LoadOptions(
        folder=location(checkpoint.load) if checkpoint.load else None,
        step=checkpoint.iteration,
        allow_fresh_start=checkpoint.allow_fresh_start,
        allow_changed_data=checkpoint.allow_changed_data,
        weights_only=checkpoint.finetune,
        grouped=checkpoint.upstream_gqa_layout,
        with_optimizer=not checkpoint.no_load_optim,
        with_rng=not checkpoint.no_load_rng,
        checks_forward=checkpoint.checkpoint_validation_with_forward_pass,
    )


def run_folder(config: Config) -> Path:
    """Where the run's log goes: log_dir, else beside the checkpoints, else logs/."""
    return Path(config.observe.log_dir or local_folder(config.checkpoint.save) or "logs")


def describe(config: Config) -> str:
    """One line on batch and length."""
    virtual = f" behind {count} virtual ones" if (count := config.tuning.num_virtual_tokens) else ""
    batch = config.batch
    return (
        f"{batch.train_batch_size} sequences of {config.model.seq_length} tokens{virtual} a step = "
        f"{batch.train_micro_batch_size_per_gpu} x {batch.gradient_accumulation_steps} micro-batches x "
        f"{config.parallel.data_parallel_size} replicas"
    )


def _loaders(
    config: Config, groups: ProcessGroups, tokenizer: Tokenizer, datasets: Datasets
) -> tuple[BatchLoader, BatchLoader | None, BatchLoader | None]:
    """This rank's loaders for training, validation and test."""

    def loader(dataset: TokenDataset) -> BatchLoader:
        return BatchLoader(
            dataset,
            config.batch.train_micro_batch_size_per_gpu,
            config.batch.gradient_accumulation_steps,
            groups.dp_rank,
            groups.dp_size,
            eod_mask_loss=config.data.eod_mask_loss,
            eod_id=tokenizer.eod_id,
            num_workers=config.data.num_workers,
            vocab_size=config.tokenizer.vocab_size,
            # A question's labels are two bits; a language model's are tokens.
            num_labels=4 if config.model.task == "question_answering" else config.model.num_labels,
        )

    assert datasets.train is not None
    valid, test = (None if dataset is None else loader(dataset) for dataset in (datasets.valid, datasets.test))
    return loader(datasets.train), valid, test


def _check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    # A model may know more ids than its tokenizer uses.
    if tokenizer.vocab_size > config.tokenizer.vocab_size:
        raise ConfigError(
            f"{config.tokenizer.vocab_file}: the tokenizer knows {tokenizer.vocab_size} ids, the config was resolved "
            f"for {config.tokenizer.vocab_size}. Start again so that the sizes are computed afresh."
        )
