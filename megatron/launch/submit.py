"""A Slurm batch job for a run: its folder, its script, and handing it to sbatch.

The folder holds the resolved configuration, so that a file edited while the job waits changes nothing. Invariant: the
script holds no value of an environment variable; sbatch gives the job the environment of the shell that submits it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.common.errors import ConfigError, LaunchError
from megatron.config import Config
from megatron.launch.job import CONFIG_FILE, JOB_FILE, OUTCOME_FILE, Job, plan_job
from megatron.launch.starters import node_command, slurm_line, slurm_options

SCRIPT_FILE = "submit.sh"
# Slurm looks at time limits every 30 s, so that a signal may come that much earlier, but never later.
WARN_S = 120


@dataclass(frozen=True)
class Request:
    """What is asked of Slurm. None: the cluster's default; cpus_per_node None: whole nodes."""

    nodes: int = 1
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    comment: str | None = None
    qos: str | None = None
    job_name: str | None = None
    warn_s: int = WARN_S
    sbatch_args: str = ""


REQUEST_FLAGS = tuple(Request.__dataclass_fields__)


def submit(config: Config, script: str, request: Request, command: Sequence[str], *, dry_run: bool) -> str:
    """Write a job's folder and hand its script to sbatch; or do nothing. Returns what to tell: the script or its place.

    command: the command line, for the script's first lines. Raises: ConfigError or LaunchError for what the user can
    mend.
    """
    logs = Path(config.observe.log_dir or "logs").absolute()
    name = request.job_name or _name_of(config)
    folder = logs / "jobs" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    job = dataclasses.replace(plan_job(config, script, folder, {}), is_batch=True)
    _check(config, request, job)
    text = batch_script(config, request, job, name, logs / "jobs", command)
    if dry_run:
        return text
    if shutil.which("sbatch") is None:
        raise LaunchError("--submit needs sbatch on the PATH of this host. Use a login node of the Slurm cluster.")
    folder.mkdir(parents=True)
    config.write(folder / CONFIG_FILE)
    job.write()
    file = folder / SCRIPT_FILE
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    done = subprocess.run(["sbatch", "--parsable", str(file)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise LaunchError(
            f"sbatch did not take the job (exit code {done.returncode}): {done.stderr.strip()}\n--submit --dry-run "
            "prints the script."
        )
    number = done.stdout.strip().split(";")[0]
    return f"submitted job {number}\nscript {file}\nlog    {logs / 'jobs' / f'{name}-{number}.log'}"


def batch_script(config: Config, request: Request, job: Job, name: str, logs: Path, command: Sequence[str]) -> str:
    """The script, for a person to read and to change."""
    lines = ["#!/usr/bin/env bash", f"# Written by: {shlex.join(command)}"]
    lines += [f"#SBATCH {option}" for option in _options(config, request, name, logs)]
    node = node_command(job, "$job/" + JOB_FILE)
    start = shlex.join(slurm_line(config, request.nodes, [])) + " \\\n    " + shlex.join(node[:-1])
    is_requeued = config.checkpoint.save is not None
    return "\n".join(
        [
            *lines,
            "",
            f"job={shlex.quote(job.folder)}   # {CONFIG_FILE}: the configuration as it was when this was submitted",
            'outcome="$job/' + OUTCOME_FILE + '-$SLURM_JOB_ID"',
            'echo "== $(date "+%F %T") job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), '
            'on $SLURM_JOB_NODELIST"',
            'rm -f "$outcome"',
            "",
            "# A signal from Slurm reaches the run by itself; this shell only has to wait on.",
            "is_ending=",
            "trap 'is_ending=yes' TERM INT USR1",
            "# One launcher on each node, which starts that node's processes.",
            start + ' "$job/' + JOB_FILE + '" &',
            "while :; do",
            "    wait $!; code=$?",
            "    kill -0 $! 2>/dev/null || break",
            "done",
            '[ ! -r "$outcome" ] || code=$(cat "$outcome")',
            'rm -f "$outcome"',
            'echo "== $(date "+%F %T") job $SLURM_JOB_ID ended with exit code $code"',
            *(_REQUEUE if is_requeued else ()),
            'exit "$code"',
            "",
        ]
    )


_REQUEUE = (
    "",
    "# 138: the time limit is near; 143: the nodes are wanted. The run has saved, and goes on when started again.",
    "# Where Slurm also told this shell, it is ending or requeueing the job itself.",
    'if [ -z "$is_ending" ] && { [ "$code" = 138 ] || [ "$code" = 143 ]; }; then',
    '    scontrol requeue "$SLURM_JOB_ID"',
    "fi",
)


def _options(config: Config, request: Request, name: str, logs: Path) -> list[str]:
    options: list[tuple[str, str | int | None]] = [
        ("job-name", name),
        ("nodes", request.nodes),
        ("ntasks-per-node", 1),
        ("gpus-per-node", request.gpus_per_node),
        ("cpus-per-task", request.cpus_per_node),
        ("time", request.time),
        ("partition", request.partition),
        ("qos", request.qos),
        *{**slurm_options(config), **_given(account=request.account, comment=request.comment)}.items(),
        # To the processes, not to this script.
        ("signal", f"USR1@{request.warn_s}"),
        ("chdir", str(Path.cwd())),
        ("output", str(logs / f"{name}-%j.log")),
        ("open-mode", "append"),
    ]
    lines = [f"--{option}={_word(value)}" for option, value in options if value is not None]
    if request.cpus_per_node is None:
        lines.append("--exclusive")
    lines.append("--requeue" if config.checkpoint.save is not None else "--no-requeue")
    return lines + [word for word in shlex.split(request.sbatch_args) if word]


def _given(**values: str | None) -> dict[str, str]:
    return {name: value for name, value in values.items() if value is not None}


def _word(value: str | int) -> str:
    text = str(value)
    if "\n" in text:
        raise ConfigError(f"{text!r}: an option of sbatch is one line.")
    return shlex.quote(text)


def _name_of(config: Config) -> str:
    stem = Path(config.files[-1].path).stem if config.files else "run"
    return re.sub(r"[^\w.-]", "_", stem)


def _check(config: Config, request: Request, job: Job) -> None:
    per_node = len(job.hosts[0].slots)
    if len(job.hosts) != request.nodes:
        raise ConfigError(f"--nodes {request.nodes}, and num_nodes = {len(job.hosts)}. Remove one of the two.")
    if request.gpus_per_node is not None and per_node != request.gpus_per_node:
        raise ConfigError(
            f"--gpus-per-node {request.gpus_per_node} on {request.nodes} nodes, and the run has {job.world_size} "
            f"processes ({config.origin('world_size')}): {per_node} on each node. Make them equal, or remove one."
        )
    if config.launcher.device == "cuda" and request.gpus_per_node is None:
        raise ConfigError("--submit of a run on GPUs needs --gpus-per-node.")
    if request.time is not None and not re.fullmatch(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}", request.time):
        raise ConfigError(f"--time {request.time}: write minutes, HH:MM:SS, D-HH or D-HH:MM:SS, as for sbatch.")


def add_submit_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of --submit; their names are sbatch's where it has them."""
    group = parser.add_argument_group("batch jobs")
    group.add_argument("--submit", action="store_true", help="submit a Slurm job; with --dry-run, print its script")
    group.add_argument("--nodes", type=int, metavar="N", help="nodes of the job; unset: num_nodes, or 1")
    group.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs, and processes, on each node (--plan: 8)")
    group.add_argument("--cpus-per-node", type=int, metavar="N", help="cores on each node; unset: whole nodes")
    group.add_argument("--time", metavar="LIMIT", help="time limit, as for sbatch; the run goes on after it")
    group.add_argument("--warn-s", type=int, metavar="S", help=f"seconds before the limit to save and stop ({WARN_S})")
    for name in ("partition", "account", "comment", "qos", "job-name"):
        group.add_argument(f"--{name}", metavar="TEXT", help=f"sbatch --{name}")
    group.add_argument("--sbatch-args", metavar="ARGS", help="further options for sbatch, in one word")


def submit_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Keys that the flags of --submit set. Raises: ConfigError for such a flag without --submit, or no whole number."""
    given = [name for name in REQUEST_FLAGS if getattr(options, name) is not None]
    if not options.submit:
        if given:
            raise ConfigError(f"--{given[0].replace('_', '-')} describes a batch job and needs --submit.")
        return {}
    for name in ("nodes", "gpus_per_node", "cpus_per_node", "warn_s"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {number}: write a whole number above 0.")
    values: dict[str, Any] = {"launcher": "slurm"}
    if options.nodes is not None:
        values["num_nodes"] = options.nodes
    if options.gpus_per_node is not None:
        values |= {"num_gpus": options.gpus_per_node, "device": "cuda"}
    return values


def own_command(argv: Sequence[str]) -> list[str]:
    """The command line that was given, for the script."""
    return ["./" + Path(sys.argv[0]).name, *argv]


def request_of(options: argparse.Namespace, config: Config) -> Request:
    """What the flags ask for."""
    given = {name: value for name in REQUEST_FLAGS if (value := getattr(options, name)) is not None}
    return Request(**{"nodes": max(1, config.launcher.num_nodes), **given})
