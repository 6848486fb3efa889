"""Metrics to Weights & Biases. The only file that imports wandb.

No API key is ever read from the configuration: wandb finds it in WANDB_API_KEY or in ~/.netrc, where its login put it.
Invariant: without a key nothing is sent anywhere; the run is written to disk and can be sent later by `wandb sync`.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from megatron.common.errors import ConfigError

DEFAULT_HOST = "https://api.wandb.ai"


@dataclass(frozen=True)
class WandbOptions:
    """What a W&B run is called and where it goes; `config` is shown beside the curves."""

    folder: Path
    project: str = "neox"
    group: str | None = None
    name: str | None = None
    team: str | None = None
    host: str = DEFAULT_HOST
    config: Mapping[str, Any] = field(default_factory=dict)


class WeightsAndBiases:
    """A sink that logs to a W&B run, offline when there is no API key."""

    def __init__(self, options: WandbOptions, say: Callable[[str], None]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "use_wandb is set, and the package wandb is not installed. "
                "Run `pip install -r requirements/requirements-wandb.txt`, or set use_wandb: false."
            ) from None
        mode = os.environ.get("WANDB_MODE")
        if mode is None and not has_api_key(options.host):
            mode = "offline"
            say(
                f"W&B: no API key for {options.host}, so the run is written to {options.folder / 'wandb'} only; "
                "`wandb sync` sends it later"
            )
        options.folder.mkdir(parents=True, exist_ok=True)
        self._wandb = wandb
        self._run = wandb.init(
            project=options.project,
            group=options.group,
            name=options.name,
            entity=options.team,
            dir=str(options.folder),
            config=dict(options.config),
            mode=mode,  # type: ignore[arg-type] # wandb checks the environment's word itself
            settings=wandb.Settings(base_url=options.host, silent=True),
        )

    def record(self, step: int, metrics: Mapping[str, float], consumed_tokens: int | None) -> None:
        """Log the metrics at a step; wandb joins records of the same step."""
        more = {} if consumed_tokens is None else {"train/consumed_tokens": consumed_tokens}
        self._run.log({**metrics, **more}, step=step)

    def go_on_from(self, step: int) -> str | None:
        """Nothing to take back: every start of a run is a run of its own at W&B."""
        return None

    def close(self) -> None:
        """End the run; when this returns, its file is complete."""
        self._run.finish()
        # `finish` may return while wandb's own process still writes: only its end says that it has.
        self._wandb.teardown()


def has_api_key(host: str = DEFAULT_HOST) -> bool:
    """Whether wandb would find an API key for `host`, found out without importing it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return entries.authenticators(urlparse(host).hostname or host) is not None
