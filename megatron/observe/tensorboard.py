"""Metrics as TensorBoard event files. The only file that imports tensorboardX.

Invariant: a continued run hides what its predecessor wrote beyond the checkpoint, so that curves do not run back.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.common.errors import ConfigError


class TensorBoard:
    """A sink that writes event files into a folder."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "tensorboard_dir is set, and the package tensorboardX is not installed. "
                "Run `pip install -r requirements/requirements-tensorboard.txt`, or remove the key."
            ) from None
        self._make_writer = SummaryWriter
        self._folder = folder
        self._writer: Any = None

    def record(self, step: int, metrics: Mapping[str, float], consumed_tokens: int | None) -> None:
        """Write one scalar per metric."""
        if self._writer is None:
            # Files are named by the second: without a suffix, a run continued within it would overwrite the first.
            suffix = f".{time.time_ns()}"
            self._writer = self._make_writer(str(self._folder), purge_step=step, flush_secs=10, filename_suffix=suffix)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        if consumed_tokens is not None:
            self._writer.add_scalar("train/consumed_tokens", consumed_tokens, step)

    def go_on_from(self, step: int) -> str | None:
        """The next record opens a file that hides what others hold of its step and beyond."""
        self.close()
        return None

    def close(self) -> None:
        """Write what is buffered; a second call does nothing."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None
