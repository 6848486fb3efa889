"""The command line that deepy.py and the scripts it starts share: flags, configuration files, overrides.

Reads no file. Invariant: a flag that is not given changes nothing.
"""

from __future__ import annotations

import argparse
import difflib
from typing import Any, NoReturn

from megatron.common.errors import ConfigError
from megatron.config.merge import Setting
from megatron.config.source import parse_value

# Flag -> configuration key, where the flag sets one; upstream's names.
OVERRIDING_FLAGS = {
    "wandb_group": "wandb_group",
    "wandb_run_name": "wandb_run_name",
    "wandb_team": "wandb_team",
    "eval_tasks": "eval_tasks",
    "iteration": "iteration",
    "eval_results_prefix": "eval_results_prefix",
    "hostfile": "hostfile",
    "sample_input_file": "sample_input_file",
    "sample_output_file": "sample_output_file",
}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are ConfigErrors like all others."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; what it does not know is answered with what was probably meant."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._about(unknown))
        return options

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")

    def _about(self, unknown: list[str]) -> str:
        message = f"unrecognized arguments: {' '.join(unknown)}"
        settings = [text for text in unknown if "=" in text and not text.startswith("-")]
        if settings and "--set" in self._option_string_actions:
            repeated = " ".join(f"--set {text}" for text in settings)
            return f"{message}. --set takes one KEY=VALUE, and is repeated: {repeated}"
        if not any(text.startswith("-") for text in unknown):
            return f"{message}. Configuration files stand together, right behind the script"
        flag, _, value = next((text for text in unknown if text.startswith("-")), "").partition("=")
        if near := difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.8):
            return f"{message}. Did you mean {near[0]}?"
        key = flag.lstrip("-").replace("-", "_")
        if key and "--set" in self._option_string_actions:
            return f"{message}. Keys of the configuration are set so: --set {key}={value or 'VALUE'}"
        return message


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that deepy.py and the scripts share."""
    parser.add_argument("-d", "--conf_dir", metavar="DIR", help="folder that the configuration files are relative to")
    parser.add_argument("--wandb_group", metavar="NAME", help="W&B group")
    parser.add_argument("--wandb_run_name", metavar="NAME", help="W&B run name")
    parser.add_argument("--wandb_team", metavar="NAME", help="W&B team")
    parser.add_argument("--eval_tasks", nargs="+", metavar="TASK", help="lm-eval tasks; stands after the files")
    parser.add_argument("--iteration", type=int, metavar="STEP", help="step of the checkpoint to load")
    parser.add_argument("--eval_results_prefix", metavar="TEXT", help="stands before the name of the result file")
    parser.add_argument("-H", "--hostfile", metavar="FILE", help="file with `host slots=N` lines")
    parser.add_argument("-i", "--sample_input_file", metavar="FILE", help="file with prompts")
    parser.add_argument("-o", "--sample_output_file", metavar="FILE", help="where generated text goes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="set a key; dots reach into blocks; repeatable"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")


def overrides_of(options: argparse.Namespace) -> dict[str, Any]:
    """Keys and values that the flags set, each a `Setting`. Raises: ConfigError for a --set that cannot be read."""
    values: dict[str, Any] = {
        key: Setting(getattr(options, flag), f"--{flag}")
        for flag, key in OVERRIDING_FLAGS.items()
        if getattr(options, flag) is not None
    }
    for assignment in options.set:
        where = f"--set {assignment}"
        spelt, equals, text = assignment.partition("=")
        first, *rest = spelt.strip().split(".")
        if not equals or not first:
            raise ConfigError(f"{where}: write KEY=VALUE, for example --set optimizer.params.lr=1e-4")
        key = ".".join((first.replace("-", "_"), *rest))
        if key in values:
            raise ConfigError(f"{where}: {key} is also set by {values[key].where}. Keep one of the two.")
        values[key] = Setting(parse_value(text, where), where)
    return values
