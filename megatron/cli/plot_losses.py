"""`tools/plot_losses.py RUN [-o PNG]`: training and validation loss of a run as a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron.observe.metrics_log import LOG_NAME
from megatron.observe.plot import plot_losses


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw training and validation loss from a run's JSONL log as a PNG.")
    parser.add_argument("run", type=Path, help=f"folder of a run (its save or log_dir), or its {LOG_NAME}")
    parser.add_argument("-o", "--output", type=Path, help="the PNG to write [losses.png beside the log]")
    parser.add_argument("--tokens", action="store_true", help="tokens instead of steps on the horizontal axis")
    parser.add_argument("--log-scale", action="store_true", help="logarithmic loss axis")
    parser.add_argument("--title", default="", help="text above the picture")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, draw."""
    options = build_parser().parse_args(arguments)
    log: Path = options.run / LOG_NAME if options.run.is_dir() else options.run
    picture: Path = options.output or log.with_name("losses.png")
    plot_losses(
        log,
        picture,
        x_axis="tokens" if options.tokens else "steps",
        is_log_scale=options.log_scale,
        title=options.title,
    )
    print(f"wrote {picture}")
    return 0
