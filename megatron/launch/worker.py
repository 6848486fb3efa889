"""How a script becomes its rank: by `--config FILE` from deepy.py, or by YAML files and the environment of torchrun.

Does not import torch. Invariant: after `worker_config`, the environment names this process's rank and the
configuration's world size is that of the run.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from megatron.common.devices import count_cores
from megatron.common.errors import LaunchError
from megatron.common.rank import RankEnv, detect_rank
from megatron.config import Config, load, require_inputs
from megatron.launch.arguments import Parser, add_flags, overrides_of

Purpose = Literal["train", "generate", "evaluate"]


def worker_config(argv: Sequence[str] | None = None, purpose: Purpose = "train") -> Config:
    """The configuration of this process, which from here on is one rank.

    argv: the command line without the program; unset, this process's.

    Raises: ConfigError, DataError or LaunchError for what the user can mend.
    """
    parser = Parser(prog=f"{purpose}.py", allow_abbrev=False)
    parser.add_argument("conf_file", nargs="*", help="configuration files")
    parser.add_argument("--config", metavar="FILE", help="a resolved configuration, as deepy.py writes it")
    add_flags(parser)
    options = parser.parse_args(argv)
    rank_env = detect_rank()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // rank_env.local_world_size)))
    if options.config:
        config = Config.read(options.config)
        _follow_parent()
        _remove_once_read(options.config)
    else:
        if not options.conf_file:
            parser.error("no configuration file is given")
        config = load(
            options.conf_file,
            overrides_of(options),
            conf_dir=options.conf_dir,
            devices=rank_env.world_size,
            inference=purpose != "train",
        )
        if purpose != "train" or not config.width.ends_the_run:
            if purpose == "train":
                config.require_training()
            require_inputs(config, data=purpose == "train")
        if rank_env.rank == 0:
            for warning in config.warnings:
                print(f"note: {warning}", file=sys.stderr)
    _check_world(config, rank_env)
    if config.launcher.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return config


def _check_world(config: Config, rank_env: RankEnv) -> None:
    if config.parallel.world_size != rank_env.world_size:
        raise LaunchError(
            f"the configuration is for {config.parallel.world_size} processes and {rank_env.world_size} are running "
            f"({rank_env.starter}). Start as many, or give the YAML files instead of --config."
        )


def _remove_once_read(path: str) -> None:
    """A run of one process replaces deepy.py, which then cannot clean up; the worker does."""
    if os.environ.pop("MEGATRON_REMOVE_CONFIG", None) == path:
        shutil.rmtree(Path(path).parent, ignore_errors=True)


def _follow_parent() -> None:
    """End when the launcher is gone. Linux does it by itself (see launch.spawn); elsewhere a thread looks."""
    parent = os.environ.pop("MEGATRON_PARENT_PID", None)
    if parent is None or sys.platform == "linux":
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1.0)
        os._exit(137)

    threading.Thread(target=watch, daemon=True).start()
