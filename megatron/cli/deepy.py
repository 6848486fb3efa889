"""deepy.py: resolve the configuration, then plan, print or start the processes. Never imports torch.

Invariant: whatever is wrong with the configuration or the files it names is said before any process starts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from megatron.cli import doctor
from megatron.cli.plan import Purpose, add_plan_flags, check_plan_flags, print_plan
from megatron.common.errors import ConfigError, MegatronError
from megatron.common.rank import starter_of
from megatron.common.stop import STARTED_AT
from megatron.config import Config, load, require_inputs
from megatron.config.draft import did_you_mean
from megatron.launch import node
from megatron.launch.arguments import Parser, add_flags, overrides_of
from megatron.launch.commands import needs_other_hosts, rank_commands
from megatron.launch.restarts import refuse_restarts, require_restartable, run_with_restarts
from megatron.launch.several_hosts import describe_job, job_values, run_job
from megatron.launch.spawn import run_ranks
from megatron.launch.submit import add_submit_flags, own_command, request_of, submit, submit_overrides

INFERENCE_SCRIPTS: dict[str, Purpose] = {"generate": "generate", "evaluate": "evaluate", "eval": "evaluate"}
VERIFY_RESUME = "verify-resume"
EXAMPLES = """\
examples:
  ./deepy.py --plan train.py configs/125M.yml                  what it needs, and whether it fits; starts nothing
  ./deepy.py train.py configs/125M.yml configs/local_setup.yml --set train_iters=100
  ./deepy.py generate.py configs/125M.yml -i prompts.txt -o samples.txt
  ./deepy.py --doctor configs/125M.yml                         what this machine has and lacks for the run
  ./deepy.py --submit --nodes 4 --gpus-per-node 8 --time 24:00:00 train.py configs/20B.yml
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code; raises MegatronError for what the user can mend."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--doctor" in argv:
        return doctor.main(argv)
    if argv[:1] == ["--node"]:
        return node.main(argv[1:])
    if argv[:1] == [VERIFY_RESUME]:
        # A program of its own, because it imports torch.
        script = Path(__file__).resolve().parents[2] / "tools" / "verify_resume.py"
        os.execv(sys.executable, [sys.executable, "-u", str(script), *argv[1:]])
    parser = Parser(
        prog="deepy.py",
        description="Start a script on every process of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "user_script",
        help="train.py, generate.py, evaluate.py or one of your own; verify-resume: is a continued run the same?",
    )
    parser.add_argument("conf_file", nargs="+", help="configuration files; .yml is appended where it is missing")
    add_plan_flags(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print each rank's command and environment; start nothing"
    )
    parser.add_argument("--write-config", metavar="FILE", help="with --dry-run: write the resolved configuration here")
    parser.add_argument(
        "--doctor", action="store_true", help="look at this machine: what it has, lacks, and how to mend it"
    )
    parser.add_argument(
        "--max-restarts",
        type=_count,
        default=0,
        metavar="N",
        help="when the run fails, start it again from its newest checkpoint, at most N times",
    )
    parser.add_argument("--autotuning", choices=("tune", "run"), help="not supported yet")
    add_submit_flags(parser)
    add_flags(parser)
    options = parser.parse_args(argv)
    if options.autotuning:
        raise ConfigError("--autotuning is not supported yet. Use --plan to see what fits.")
    check_plan_flags(options)
    _require_script(options.user_script)
    purpose = Path(options.user_script).stem
    inference = purpose in INFERENCE_SCRIPTS
    if options.plan:
        return print_plan(options, overrides_of(options), INFERENCE_SCRIPTS.get(purpose))
    overrides = {**submit_overrides(options), **overrides_of(options)}
    starter = starter_of(os.environ)
    if starter != "alone" and not (options.dry_run or options.submit):
        # Already one of the processes of srun, mpirun or torchrun: become that rank.
        refuse_restarts(options.max_restarts, starter)
        os.execv(
            sys.executable, [sys.executable, "-u", options.user_script, *_without_script(argv, options.user_script)]
        )
    config = load(options.conf_file, overrides, conf_dir=options.conf_dir, inference=inference)
    for warning in config.warnings:
        print(f"note: {warning}", file=sys.stderr)
    if options.dry_run and not options.submit:
        return _dry_run(config, options.user_script, options.write_config, as_json=options.json)
    _require_runnable(config, purpose, inference=inference, only_shown=options.submit and options.dry_run)
    if options.submit:
        request = request_of(options, config)
        print(submit(config, options.user_script, request, own_command(argv), dry_run=options.dry_run))
        return 0
    if not options.max_restarts:
        return start(config, options.user_script)
    require_restartable(config, options.user_script, is_inference=inference)
    return run_with_restarts(
        lambda current: start(current, options.user_script, stays=True), config, options.max_restarts
    )


def _require_runnable(config: Config, purpose: str, *, inference: bool, only_shown: bool) -> None:
    """Refuse a run that lacks keys or files; where the job is only shown, say that it would be refused."""
    if not inference and config.width.ends_the_run:
        return
    try:
        if purpose == "train":
            config.require_training()
        require_inputs(config, data=not inference)
    except MegatronError as error:
        if not only_shown:
            raise
        for line in str(error).splitlines():
            print(f"note: the job would be refused: {line}", file=sys.stderr)


def start(config: Config, script: str, *, stays: bool = False) -> int:
    """Start the script's processes and wait for them.

    A single one on this host takes this process's place, unless it `stays`.
    """
    # For the processes, and for the launchers of other hosts. The job's time runs on through restarts.
    os.environ.setdefault(STARTED_AT, str(time.time()))
    if needs_other_hosts(config, os.environ):
        return run_job(config, script)
    folder = Path(tempfile.mkdtemp(prefix="megatron-"))
    try:
        file = folder / "config.json"
        commands = rank_commands(config, script, file)
        config.write(file)
        if len(commands) == 1 and not stays:
            sys.stdout.flush()
            environment = {**os.environ, **commands[0].added, "MEGATRON_REMOVE_CONFIG": str(file)}
            os.execve(sys.executable, commands[0].arguments, environment)
        return run_ranks(commands, grace_mins=config.launcher.exit_grace_in_mins)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _dry_run(config: Config, script: str, config_file: str | None, *, as_json: bool) -> int:
    if config_file:
        config.write(config_file)
    if as_json:
        if needs_other_hosts(config, os.environ):
            values = job_values(config, script)
        else:
            values = {"ranks": [one.values() for one in rank_commands(config, script, config_file or "CONFIG.json")]}
        print(json.dumps(values, indent=1))
        return 0
    if not config_file:
        print("# CONFIG.json: the resolved configuration (--write-config CONFIG.json writes it)")
    if needs_other_hosts(config, os.environ):
        print(describe_job(config, script))
        return 0
    for command in rank_commands(config, script, config_file or "CONFIG.json"):
        print(command.shell_line())
    return 0


def _require_script(script: str) -> None:
    if not Path(script).is_file():
        here = sorted(entry.name for entry in Path().glob("*.py"))
        near = did_you_mean(Path(script).name, here) or (f" Here are: {', '.join(here)}." if here else "")
        raise ConfigError(f"{script}: there is no such script (looked from {Path.cwd()}).{near}")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number, 0 or more")
    return int(text)


def _without_script(argv: Sequence[str], script: str) -> list[str]:
    arguments = list(argv)
    arguments.remove(script)
    return arguments
