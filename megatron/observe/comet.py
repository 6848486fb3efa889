"""Metrics to Comet. The only file that imports comet_ml.

Invariant: without an API key (COMET_API_KEY or ~/.comet.config) nothing is sent; the experiment is written to disk and
can be sent later by `comet upload`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.common.errors import ConfigError


@dataclass(frozen=True)
class CometOptions:
    """What a Comet experiment is called and where it goes; `others` and `config` are shown beside the curves."""

    folder: Path
    workspace: str | None = None
    project: str | None = None
    name: str | None = None
    tags: Sequence[str] = ()
    others: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


class Comet:
    """A sink that logs to a Comet experiment, offline when there is no API key."""

    def __init__(self, options: CometOptions, say: Callable[[str], None]) -> None:
        try:
            import comet_ml
        except ImportError:
            raise ConfigError(
                "use_comet is set, and the package comet_ml is not installed. "
                "Run `pip install -r requirements/requirements-comet.txt`, or set use_comet: false."
            ) from None
        is_online = bool(comet_ml.config.get_api_key(None, comet_ml.get_config()))
        folder = options.folder / "comet"
        if not is_online:
            folder.mkdir(parents=True, exist_ok=True)
            say(f"Comet: no API key, so the experiment is written to {folder} only; `comet upload` sends it later")
        self._experiment = comet_ml.start(
            workspace=options.workspace,
            project_name=options.project,
            online=is_online,
            experiment_config=comet_ml.ExperimentConfig(
                name=options.name,
                tags=list(options.tags),
                offline_directory=str(folder),
                auto_metric_logging=False,
                log_code=False,
                log_git_metadata=False,
            ),
        )
        self._experiment.log_parameters(dict(options.config))
        self._experiment.log_others(dict(options.others))

    def record(self, step: int, metrics: Mapping[str, float], consumed_tokens: int | None) -> None:
        """Log the metrics at a step."""
        more = {} if consumed_tokens is None else {"train/consumed_tokens": consumed_tokens}
        self._experiment.log_metrics({**metrics, **more}, step=step)

    def go_on_from(self, step: int) -> str | None:
        """Nothing to take back: every start of a run is a run of its own at Comet."""
        return None

    def close(self) -> None:
        """End the experiment."""
        self._experiment.end()
