"""Which sinks a run has, by its configuration.

Invariant: the JSONL log is always among those of the main rank, and stands first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from megatron.common.errors import ConfigError
from megatron.config import Config
from megatron.observe.comet import Comet, CometOptions
from megatron.observe.metrics_log import LOG_NAME, MetricsLog
from megatron.observe.recorder import ForgivingSink, Recorder, Sink
from megatron.observe.tensorboard import TensorBoard
from megatron.observe.weights_and_biases import WandbOptions, WeightsAndBiases, has_api_key

_log = logging.getLogger(__name__)


def build_recorder(
    config: Config, run_dir: Path, is_main_rank: bool, say: Callable[[str], None] = _log.warning
) -> Recorder:
    """The recorder of this rank: all sinks on the main rank, none elsewhere (W&B with wandb_init_all_ranks).

    say: told, once each, what is on by itself, what goes to disk only, and what failed.
    Raises: ConfigError if a logger is asked for and its package is missing.
    """
    observe = config.observe
    sinks: list[Sink] = []
    if is_main_rank:
        sinks.append(MetricsLog(run_dir / LOG_NAME))
        if observe.tensorboard_dir:
            sinks.append(TensorBoard(Path(observe.tensorboard_dir)))
    if is_main_rank or observe.wandb_init_all_ranks:
        _add_remote(sinks, "W&B", lambda: _wandb(config, run_dir, say), say)
    if is_main_rank and observe.use_comet:
        _add_remote(sinks, "Comet", lambda: _comet(config, run_dir, say), say)
    return Recorder(sinks)


def _add_remote(sinks: list[Sink], name: str, make: Callable[[], Sink | None], say: Callable[[str], None]) -> None:
    try:
        sink = make()
    except ConfigError:
        raise
    except Exception as error:
        say(f"{name} could not be started and is left out; training goes on. It said: {type(error).__name__}: {error}")
        return
    if sink is not None:
        sinks.append(ForgivingSink(sink, name, say))


def _wandb(config: Config, run_dir: Path, say: Callable[[str], None]) -> Sink | None:
    observe = config.observe
    if observe.use_wandb is False or (observe.use_wandb is None and not has_api_key(observe.wandb_host)):
        return None
    options = WandbOptions(
        folder=run_dir,
        project=observe.wandb_project,
        group=observe.wandb_group,
        name=observe.wandb_run_name,
        team=observe.wandb_team,
        host=observe.wandb_host,
        config=config.to_upstream_dict(),
    )
    if observe.use_wandb:
        return WeightsAndBiases(options, say)
    try:
        sink = WeightsAndBiases(options, say)
    except ConfigError:
        say("W&B: an API key is there, but not the package: not logging to W&B (use_wandb: false silences this)")
        return None
    say("W&B is on, because an API key was found (use_wandb: false turns it off)")
    return sink


def _comet(config: Config, run_dir: Path, say: Callable[[str], None]) -> Sink:
    observe = config.observe
    return Comet(
        CometOptions(
            folder=run_dir,
            workspace=observe.comet_workspace,
            project=observe.comet_project,
            name=observe.comet_experiment_name,
            tags=observe.comet_tags or (),
            others=observe.comet_others or {},
            config=config.to_upstream_dict(),
        ),
        say,
    )
