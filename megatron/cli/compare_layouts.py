"""`tools/compare_layouts.py`: run a configuration at two layouts and say where, if anywhere, they are not the same
model.

Checkpoints, logs and loggers of the configuration are left alone. Invariant: both runs start from the same weights,
take the same samples in the same micro-batches, and make the same number of steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.common.devices import count_gpus
from megatron.common.errors import ConfigError, DataError, LaunchError
from megatron.config import Config, load, require_inputs
from megatron.config.source import parse_value
from megatron.engine.distributed import stop_distributed
from megatron.launch.arguments import Parser
from megatron.launch.commands import rank_commands
from megatron.launch.spawn import run_ranks
from megatron.launch.worker import worker_config
from megatron.training.comparison import Finding, compare_traces
from megatron.training.scaled_down import Sizes, scaled_down, write_synthetic_data
from megatron.training.setup import build_run
from megatron.training.tracing import record

_KEYS = {
    "tp": "model_parallel_size",
    "pp": "pipe_parallel_size",
    "dp": "",
    "zero": "zero_optimization.stage",
    "sp": "sequence_parallel",
}
# What belongs to the real run, or to other machines, and must not be touched or asked for.
_LEFT_OUT: dict[str, Any] = {
    "save": None,
    "load": None,
    "extra_save_iters": None,
    "train_epochs": None,
    "finetune": False,
    "eval_iters": 0,
    "use_wandb": False,
    "use_comet": False,
    "tensorboard_dir": None,
    "hostfile": None,
    "num_nodes": -1,
    "num_gpus": None,
    "global_num_gpus": None,
    "check_replicas": 0,
    # Dropout draws from streams of the layout.
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
_NO_DATA = {f"{part}_data_{what}": None for part in ("train", "valid", "test") for what in ("paths", "weights")}
_SHOWN = 10
# Tensors whose excess is less than this part of the largest one's are followed from it: they are counted, not listed.
_SAME_ORDER = 0.1
_WORKER_FLAG = "--record"


@dataclasses.dataclass(frozen=True)
class Layout:
    """One --layout: how it was written, and sizes by short name."""

    text: str
    sizes: dict[str, int]

    @property
    def num_processes(self) -> int:
        """Ranks that it needs."""
        return math.prod(self.sizes.get(axis, 1) for axis in ("tp", "pp", "dp"))

    def overrides(self) -> dict[str, Any]:
        """Configuration keys that make it."""
        sizes = {"tp": 1, "pp": 1, **self.sizes}
        values: dict[str, Any] = {_KEYS[name]: size for name, size in sizes.items() if _KEYS[name]}
        if "sequence_parallel" in values:
            values["sequence_parallel"] = bool(values["sequence_parallel"])
        elif sizes["tp"] == 1:
            values["sequence_parallel"] = False
        return values


def main(argv: Sequence[str] | None = None) -> int:
    """Compare as the command line says: 0 if rounding explains all differences, 1 if not. Raises: MegatronError."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if _WORKER_FLAG in argv:
        return _work(argv)
    options = _parse(argv)
    layouts = [parse_layout(text) for text in options.layout]
    folder = Path(tempfile.mkdtemp(prefix="compare-layouts-"))
    try:
        configs = resolve(options, layouts, folder)
        print("Left out: dropout (its random numbers belong to the layout), checkpoints, validation and loggers.")
        for config, layout, name in zip(configs, layouts, ("first", "second"), strict=True):
            print(f"{layout.text}: {layout.num_processes} process{'es' * (layout.num_processes > 1)}, {_sizes(config)}")
            _run(config, folder / name, options.steps, options.at)
        return report(folder, layouts)
    finally:
        if options.keep:
            shutil.copytree(folder, options.keep, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def parse_layout(text: str) -> Layout:
    """A layout from `tp=2,pp=2`. Raises: ConfigError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = part.partition("=")
        least = 0 if name in ("zero", "sp") else 1
        if name not in _KEYS or not equals or not number.isdecimal() or int(number) < least or name in sizes:
            raise ConfigError(
                f"--layout {text}: {part!r} is not understood. Write sizes of {', '.join(_KEYS)}, each once, for "
                "example tp=2,pp=2 or dp=4,zero=2 or tp=2,sp=1; what is not named is 1 (zero and sp: as configured)."
            )
        sizes[name] = int(number)
    return Layout(text, sizes)


def resolve(options: argparse.Namespace, layouts: list[Layout], folder: Path) -> list[Config]:
    """The configuration at each layout, alike in all else. Raises: ConfigError or DataError."""
    most = max(layout.num_processes for layout in layouts)
    device = options.device
    if device == "auto":
        device = "cuda" if count_gpus() >= most else "cpu"
    common: dict[str, Any] = {**_LEFT_OUT, "device": device, "log_dir": str(folder / "log")}
    common |= {"train_iters": options.steps, "lr_decay_iters": options.steps}
    for assignment in options.set:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write KEY=VALUE")
        common[key.strip()] = parse_value(text)
    plain = load(
        options.conf_file, {**common, **layouts[0].overrides()}, devices=layouts[0].num_processes, planning=True
    )
    lcm = {axis: math.lcm(*(layout.sizes.get(axis, 1) for layout in layouts)) for axis in ("tp", "pp", "dp")}
    if options.scale_down:
        small = scaled_down(_model_sizes(plain), lcm["tp"], lcm["pp"], lcm["dp"])
        common = {**small, **_NO_DATA, **common}
        prefix = write_synthetic_data(folder, options.steps * int(common["train_batch_size"]), common["seq_length"])
        common |= {"data_path": str(prefix)}
        plain = load(options.conf_file, {**common, **layouts[0].overrides()}, devices=layouts[0].num_processes)
    else:
        try:
            require_inputs(plain)
        except DataError as error:
            raise DataError(
                f"{error}\nOr compare with --scale-down, which brings data and vocabulary of its own."
            ) from None
    batch = plain.batch.train_batch_size
    common |= {
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": _micro_batch_size(
            batch, plain.batch.train_micro_batch_size_per_gpu, lcm["dp"]
        ),
        "gradient_accumulation_steps": None,
    }
    # The initial values of the padded table are a function of its shape, which usually depends on tp.
    divisor = math.lcm(plain.tokenizer.make_vocab_size_divisible_by, lcm["tp"])
    common["padded_vocab_size"] = math.ceil(plain.tokenizer.vocab_size / divisor) * divisor
    return [
        load(options.conf_file, {**common, **layout.overrides()}, devices=layout.num_processes) for layout in layouts
    ]


def _micro_batch_size(train_batch_size: int, configured: int, dp: int) -> int:
    """The largest size up to the configured one that cuts the same batch at every layout."""
    rows = max(1, train_batch_size // dp)
    return max(size for size in range(1, min(rows, configured) + 1) if rows % size == 0)


def report(folder: Path, layouts: list[Layout]) -> int:
    """Print the table; 0 if rounding explains everything, else 1."""
    print(
        f"\n{'step':>4}  {'loss differs by':>15} {'grad norm by':>13}  farthest tensor (difference / explained by "
        "rounding)"
    )
    beyond: list[Finding] = []
    worst = 0.0
    for findings in compare_traces(folder / "first", folder / "second"):
        found = {finding.name: finding for finding in findings}
        tensors = [finding for finding in findings if finding.kind]
        numbers = [f"{found[name].difference:.1e}" if name in found else "" for name in ("loss", "gradient norm")]
        farthest = max(tensors, key=lambda finding: finding.ratio, default=None)
        words = "" if farthest is None else _describe(farthest)
        if findings:
            print(f"{findings[0].step:>4}  {numbers[0]:>15} {numbers[1]:>13}  {words}")
            worst = max(worst, *(finding.ratio for finding in findings))
        if any(finding.is_beyond for finding in findings):
            beyond = [finding for finding in findings if finding.is_beyond]
            break
    names = " and ".join(layout.text for layout in layouts)
    if not beyond:
        print(f"\n{names} train the same model: the largest difference is {worst:.2f} of what rounding explains")
        return 0
    print(f"\n{names} part at step {beyond[0].step}. Beyond what rounding explains, from the loss backwards:")
    most = max(finding.ratio for finding in beyond)
    listed = [finding for finding in beyond if not finding.kind]
    listed += [finding for finding in reversed(beyond) if finding.kind and finding.ratio >= most * _SAME_ORDER]
    for finding in listed[:_SHOWN]:
        print(f"  {finding.name}{f' ({finding.kind})' if finding.kind else ''}: {_size(finding)}")
    if len(beyond) > len(listed[:_SHOWN]):
        print(f"  and {len(beyond) - len(listed[:_SHOWN])} more")
    print(
        "A wrong gradient spreads from where it arises towards the input: the tensor named first lies nearest to the "
        "cause.\nIf the loss differs at step 1, it is the forward pass; if only some tensors do, their own gradients. "
        "Clipping\nscales all gradients by a wrong norm: --set gradient_clipping=0 leaves those that are wrong "
        "themselves."
    )
    return 1


def _work(argv: Sequence[str]) -> int:
    """One rank of one of the runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True)
    parser.add_argument(_WORKER_FLAG, type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--at", type=int, nargs="+", required=True)
    options = parser.parse_args(argv)
    config = worker_config(["--config", options.config])
    # The table is the parent's; errors go to stderr.
    with contextlib.redirect_stdout(io.StringIO()):
        run = build_run(config)
        try:
            record(run, options.record, options.steps, options.at)
        finally:
            run.close()
    stop_distributed()
    return 0


def _run(config: Config, folder: Path, steps: int, at: list[int] | None) -> None:
    folder.mkdir()
    file = folder / "config.json"
    script = str(Path(__file__).resolve().parents[2] / "tools" / "compare_layouts.py")
    chosen = sorted({step for step in at or (1, 2, 5, 10, 20, 50, 100, steps) if 1 <= step <= steps})
    extra = [_WORKER_FLAG, str(folder), "--steps", str(steps), "--at", *map(str, chosen)]
    commands = [
        dataclasses.replace(command, arguments=[*command.arguments, *extra])
        for command in rank_commands(config, script, file)
    ]
    config.write(file)
    sys.stdout.flush()
    code = run_ranks(commands)
    if code:
        raise LaunchError(f"the run at this layout ended with exit code {code}; its own message stands above.")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="compare_layouts.py", description="Is it the same model at two layouts?", allow_abbrev=False)
    add = parser.add_argument
    add("conf_file", nargs="+", help="configuration files")
    add("--layout", action="append", required=True, metavar="tp=2,pp=2", help="twice: sizes of tp, pp, dp, zero, sp")
    add("--steps", type=int, default=20, help="optimizer steps [20]")
    add(
        "--at", type=int, nargs="+", metavar="STEP", help="steps after which tensors are compared [1 2 5 10 20 .. last]"
    )
    add("--scale-down", action="store_true", help="fewer layers, narrower, shorter, with made-up data and vocabulary")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs where there are enough of them")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="set a key in both runs; repeatable")
    add("--keep", type=Path, metavar="DIR", help="copy both runs' traces and tensors here")
    add("--debug", action="store_true", help="show tracebacks of errors")
    options = parser.parse_args(argv)
    if len(options.layout) != 2:
        parser.error(f"--layout is given {len(options.layout)} times; two layouts are compared")
    if options.steps < 1:
        parser.error("--steps must be 1 or more")
    return options


def _model_sizes(config: Config) -> Sizes:
    model = config.model
    return Sizes(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_kv_heads=model.num_kv_heads or model.num_attention_heads,
        ffn_size=model.ffn_size,
        seq_length=model.seq_length,
        micro_batch_size=config.batch.train_micro_batch_size_per_gpu,
        num_virtual_tokens=config.tuning.num_virtual_tokens,
    )


def _sizes(config: Config) -> str:
    model, batch = config.model, config.batch
    return (
        f"{config.precision.precision} on {config.launcher.device}, {model.num_layers} layers, hidden "
        f"{model.hidden_size}, "
        f"sequence {model.seq_length}, batch {batch.train_batch_size} = {batch.train_micro_batch_size_per_gpu} x "
        f"{batch.gradient_accumulation_steps} x {config.parallel.data_parallel_size}"
    )


def _describe(finding: Finding) -> str:
    return f"{finding.name} ({finding.kind}): {_size(finding)}"


def _size(finding: Finding) -> str:
    return f"{finding.difference:.2g} / {finding.noise:.2g}" + (
        f" = {finding.ratio:.1f} times" if finding.is_beyond else ""
    )
