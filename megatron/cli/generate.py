"""`generate.py`: text from the newest checkpoint of a run.

Started by deepy.py with the resolved configuration in a file, or by hand with YAML files, in one process.
"""

from __future__ import annotations

import argparse
from typing import Any

from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.inference.setup import generate_from_config


def main(argv: list[str] | None = None) -> int:
    """Generate as the configuration says. Raises: MegatronError for what the user can mend."""
    args = _parse(argv)
    if args.megatron_config:
        config = Config.read(args.megatron_config)
    elif args.conf_file:
        config = load(args.conf_file, _overrides(args), conf_dir=args.conf_dir, planning=True)
    else:
        raise ConfigError("no configuration was given. Use: generate.py conf.yml [-i prompts.txt] [-o samples.txt]")
    return generate_from_config(config, args.iteration)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    names = ("sample_input_file", "sample_output_file")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="generate.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("conf_file", nargs="*", help="YAML files")
    add("-d", "--conf_dir", help="folder of the YAML files")
    add("-i", "--sample_input_file", help="file with prompts")
    add("-o", "--sample_output_file", help="where the samples go, one JSON object per line")
    add("--iteration", type=int, help="the step to load; unset: the newest")
    add("--megatron_config", help="a resolved configuration, as deepy.py writes it")
    add("--debug", action="store_true", help="show tracebacks")
    return parser.parse_args(argv)
