"""`deepy.py verify-resume`: does a run that is stopped and continued stay the same run, bit by bit?

From a checkpoint of the run, its next steps are made twice, at its own layout and by its own configuration: once
without interruption, and once from the checkpoint that the first saved half-way. Or, with --next, once, to be compared
with the checkpoint that the run itself saved next. Exit code: 0 identical, 1 not, others as for training.
Invariant: everything is written to a temporary folder; the run's own checkpoints and logs are only read.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron.checkpoint import CheckpointPath, Location, Reader, find, location
from megatron.checkpoint.difference import compare_random_states, compare_state, compare_tensors
from megatron.checkpoint.find import complete
from megatron.common.errors import CheckpointError, ConfigError, LaunchError
from megatron.config import Config, load, require_inputs
from megatron.launch.arguments import Parser, add_flags, overrides_of
from megatron.launch.commands import needs_other_hosts, rank_commands
from megatron.launch.several_hosts import run_job
from megatron.launch.spawn import run_ranks
from megatron.observe.metrics_log import LOG_NAME, read_metrics

DIFFERENT = 1
ROOT = Path(__file__).resolve().parents[2]
_SHOWN = 10
# What would touch the run, or other services, or take time without a word on the question.
_LEFT_OUT: dict[str, Any] = {
    "finetune": False,
    "no_load_optim": False,
    "no_load_rng": False,
    "allow_fresh_start": False,
    "checkpoint_factor": None,
    "keep_last_n_checkpoints": None,
    "keep_checkpoint_every": None,
    "eval_tasks": None,
    "use_wandb": False,
    "use_comet": False,
    "tensorboard_dir": None,
    "exit_duration_in_mins": None,
    "log_interval": 1,
}
_METRICS = ("train/lm_loss", "train/grad_norm", "train/learning_rate")
# Of the state beside the tensors: when, where and by which file it was written says nothing about the run.
_EXPECTED = ("position.elapsed_s", "config", "forward_pass")


def main(argv: Sequence[str] | None = None) -> int:
    """Verify as the command line says. Returns the exit code. Raises: MegatronError for what the user can mend."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    overrides = overrides_of(options)
    config = load(options.conf_file, overrides, conf_dir=options.conf_dir)
    config.require_training()
    require_inputs(config)
    root, start, target = choose(config, options.at, options.steps, with_next=options.next)
    if needs_other_hosts(config, os.environ) and not options.work:
        raise ConfigError("the run needs several hosts: give --work a folder that all of them share")
    folder = Path(options.work or tempfile.mkdtemp(prefix="verify-resume-")).resolve()
    try:
        middle = (start.step + target) // 2
        whole = folder / "whole"

        def leg(name: str, source: Location, step: int, saves: list[int]) -> None:
            print(f"{name}: steps {step + 1} to {target} from {source}", flush=True)
            _run(options, overrides, folder / name, source, step, saves, target)

        leg("whole", root, start.step, [target] if options.next else [middle, target])
        if options.next:
            other, what = Reader(find(root, target)), f"the run's own checkpoint of step {target}"
        else:
            leg("parts", whole, middle, [target])
            other, what = Reader(folder / "parts" / f"global_step{target}"), f"continuing from step {middle}"
        found = list(_metrics_that_differ(whole, folder / "parts", middle)) if not options.next else []
        found += _differences(Reader(whole / f"global_step{target}"), other)
        return _report(found, f"uninterrupted from step {start.step} to {target}", what)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"kept: {folder}")


def choose(config: Config, at: int | None, steps: int, *, with_next: bool) -> tuple[Location, CheckpointPath, int]:
    """(where the run's checkpoints lie, the one to start from, the step to go to). Raises: CheckpointError."""
    address = config.checkpoint.save or config.checkpoint.load
    if address is None:
        raise ConfigError("neither save nor load is set: there is no checkpoint to start from. Set save.")
    root = location(address)
    found = {checkpoint.step: checkpoint for checkpoint in complete(root)[0]}
    if not found:
        find(root)  # says what is there instead
    there = f"complete checkpoints in {root}: {', '.join(map(str, sorted(found)))}"
    if at is not None and at not in found:
        raise CheckpointError(f"--at {at}: {there}. Choose one of them.")
    last = config.training.train_iters
    targets: dict[int, int] = {}
    for step in sorted(found):
        later = [other for other in found if other > step]
        if with_next:
            targets |= {step: min(later)} if later else {}
        elif last is None or step + steps <= last:
            targets[step] = step + steps
    start = at if at is not None else max(targets, default=None)
    if start is None or start not in targets:
        need = "one with another behind it" if with_next else f"one at least {steps} steps before train_iters = {last}"
        raise CheckpointError(
            f"{'no checkpoint' if start is None else f'--at {start}'} will do: {need} is needed; {there}. "
            + ("Leave out --next." if with_next else "Use fewer --steps (2 or more), or an earlier --at.")
        )
    return root, found[start], targets[start]


def _run(
    options: argparse.Namespace,
    overrides: dict[str, Any],
    folder: Path,
    source: Location,
    step: int,
    saves: list[int],
    target: int,
) -> None:
    folder.mkdir(parents=True)
    changes = {**_LEFT_OUT, "load": str(source), "iteration": step, "save": str(folder), "log_dir": str(folder)}
    # The schedule and the data stay those of the whole run: it leaves at `target`, and does not end there.
    changes |= {"extra_save_iters": saves, "exit_interval": target}
    config = load(options.conf_file, {**overrides, **changes}, conf_dir=options.conf_dir)
    script = str(ROOT / "train.py")
    if needs_other_hosts(config, os.environ):
        code = run_job(config, script)
    else:
        file = folder / "config.json"
        commands = rank_commands(config, script, file)
        config.write(file)
        sys.stdout.flush()
        code = run_ranks(commands)
    if code:
        raise LaunchError(f"the run ended with exit code {code}; its own message stands above.")


def _metrics_that_differ(one: Path, other: Path, after: int) -> Iterator[str]:
    ours, theirs = (read_metrics(folder / LOG_NAME) for folder in (one, other))
    for step in sorted(step for step in theirs if step > after):
        for name in _METRICS:
            a, b = ours.get(step, {}).get(name), theirs[step].get(name)
            if a != b:
                yield f"{name} of step {step}: {a!r} and {b!r}"


def _differences(one: Reader, other: Reader) -> Iterator[str]:
    layouts = [reader.state["layout"] for reader in (one, other)]
    if layouts[0] != layouts[1]:
        yield f"written at another layout ({layouts[0]} and {layouts[1]}): sums are taken in another order"
    for finding in compare_tensors(one, other):
        if not finding.is_identical:
            yield str(finding)
    yield from compare_random_states(one, other)
    for key, a, b in compare_state(one.state, other.state):
        if not key.startswith(_EXPECTED) and not key.startswith("layout"):
            yield f"{key}: {a!r} and {b!r}"


def _report(found: list[str], one: str, other: str) -> int:
    if not found:
        print(f"\nidentical: {one}, and {other}: every tensor, random state, loss and counter, bit by bit")
        return 0
    print(f"\nDIFFERENT: {one}, and {other}. First:")
    print("".join(f"  {line}\n" for line in found[:_SHOWN]), end="")
    if len(found) > _SHOWN:
        print(f"  and {len(found) - _SHOWN} more")
    return DIFFERENT


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="deepy.py verify-resume",
        description="Is a run that is stopped and continued the same run, bit by bit? Exit code 0 if so, 1 if not.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("conf_file", nargs="+", help="the run's configuration files")
    add("--steps", type=int, default=4, metavar="K", help="steps to make; the interruption is half-way [4]")
    add("--at", type=int, metavar="STEP", help="the checkpoint to start from [the newest with K steps to go]")
    add("--next", action="store_true", help="compare with the run's next checkpoint instead; --steps does not count")
    add("--work", metavar="DIR", help="work here, in place of a temporary folder")
    add("--keep", action="store_true", help="do not remove what the two runs wrote")
    add_flags(parser)
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error("--steps must be 2 or more: one before the interruption and one behind it")
    if options.iteration is not None:
        parser.error("--iteration is called --at here")
    if options.work and Path(options.work).exists() and any(Path(options.work).iterdir()):
        parser.error(f"--work {options.work} is not empty: give a new folder")
    return options
