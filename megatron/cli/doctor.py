"""`deepy.py --doctor [CONF...]`: look at this machine, and say what stands in the way of a run.

Starts two short-lived processes and nothing else. Invariant: exit code 1 exactly where something is a failure.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from megatron.common.errors import ConfigError
from megatron.config import Config, load
from megatron.config.hosts import HostfileError, read_hosts
from megatron.config.plan import count_parameters
from megatron.doctor import collective, machine, network, software, storage
from megatron.doctor.finding import Finding, Subject
from megatron.launch.arguments import Parser, add_flags, overrides_of

# fp32 weights and two moments.
_CHECKPOINT_BYTES_PER_PARAMETER = 12
_MARKS = {"ok": "ok     ", "note": "note   ", "warning": "WARNING", "failure": "FAILURE"}
_COLORS = {"ok": "32", "note": "36", "warning": "33", "failure": "31"}


def main(argv: Sequence[str]) -> int:
    """Run the checks. Returns 1 if something is a failure, else 0. Raises: ConfigError if a file cannot be read."""
    parser = Parser(
        prog="deepy.py --doctor",
        description="What this machine has for a run, what each missing thing costs, and the command that mends it.",
        allow_abbrev=False,
    )
    parser.add_argument("conf_file", nargs="*", help="configuration files: look at what this run needs")
    parser.add_argument("--json", action="store_true", help="print findings as a JSON list")
    add_flags(parser)
    options = parser.parse_args([argument for argument in argv if argument != "--doctor"])
    files = [name for name in options.conf_file if not name.endswith(".py")]
    findings: list[Finding] = []
    subject = Subject()
    if files:
        try:
            config = load(files, overrides_of(options), conf_dir=options.conf_dir, planning=True)
            subject = subject_of(config)
            findings.append(Finding("configuration", "ok", " + ".join(files)))
        except ConfigError as error:
            # The machine is looked at all the same: that is what was asked for.
            cost = "no run starts with it"
            findings.append(Finding("configuration", "failure", str(error), cost, "correct the lines named above"))
    elif options.hostfile:
        try:
            subject = Subject(hosts=read_hosts(options.hostfile))
        except HostfileError as error:
            raise ConfigError(f"--hostfile: {error}") from error
    started = time.perf_counter()
    findings += examine(subject)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        report(findings, sys.stdout, time.perf_counter() - started)
    return int(any(finding.status == "failure" for finding in findings))


def subject_of(config: Config) -> Subject:
    """What a configured run asks of the machine."""
    launcher, checkpoint, data = config.launcher, config.checkpoint, config.data
    folders = {
        "save": checkpoint.save,
        "log_dir": config.observe.log_dir,
        "tensorboard_dir": config.observe.tensorboard_dir,
    }
    reads: dict[str, Path] = {}
    tokenizer = config.tokenizer
    if tokenizer.tokenizer_type in ("GPT2BPETokenizer", "HFTokenizer", "SPMTokenizer"):
        reads |= {
            key: Path(path)
            for key, path in (("vocab_file", tokenizer.vocab_file), ("merge_file", tokenizer.merge_file))
            if path
        }
    prefixes = [("data_path", data.data_path)] if data.data_path else []
    for key in ("train_data_paths", "valid_data_paths", "test_data_paths"):
        prefixes += [(f"{key}[{index}]", prefix) for index, prefix in enumerate(getattr(data, key) or ())]
    reads |= {f"{key}{suffix}": Path(prefix + suffix) for key, prefix in prefixes for suffix in (".bin", ".idx")}
    hosts = {}
    if launcher.hostfile is not None:
        hosts = read_hosts(launcher.hostfile, launcher.include, launcher.exclude, launcher.num_nodes)
    num_hosts = len(hosts) or max(1, launcher.num_nodes)
    kept = checkpoint.keep_last_n_checkpoints
    return Subject(
        device=launcher.device,
        num_processes=max(1, config.parallel.world_size // num_hosts),
        torch_compile=config.training.torch_compile,
        folders={key: Path(folder) for key, folder in folders.items() if folder},
        reads=reads,
        # While one more is written, those that are kept are there.
        checkpoint_bytes=count_parameters(config).unique * _CHECKPOINT_BYTES_PER_PARAMETER * ((kept or 1) + 1),
        num_checkpoints=(kept or 1) + 1,
        hosts=hosts,
        starter=launcher.launcher,
        ssh_port=launcher.ssh_port,
        master_port=launcher.master_port,
    )


def examine(subject: Subject) -> list[Finding]:
    """All checks, those that wait run at the same time."""
    checks: list[Callable[[], Finding | list[Finding]]] = [
        software.check_python,
        software.check_packages,
        lambda: collective.check_torch(subject),
        lambda: software.check_flash_attention(subject),
        lambda: software.check_compiler(subject),
        lambda: software.check_extension_locks(_extensions(subject)),
        software.check_optional,
        lambda: machine.check_cores(subject),
        machine.check_memory,
        lambda: machine.check_shared_memory(subject),
        lambda: machine.check_limits(num_processes=subject.num_processes),
        lambda: machine.check_environment(subject),
        lambda: storage.check_folders(subject),
        lambda: storage.check_reads(subject),
        lambda: network.check_name(subject),
        lambda: network.check_port(subject),
        lambda: network.check_interfaces(subject),
        lambda: network.check_hosts(subject),
    ]
    with ThreadPoolExecutor(len(checks)) as pool:
        results = [pool.submit(check) for check in checks]
        return [finding for result in results for finding in _listed(result.result())]


def report(findings: Sequence[Finding], out: TextIO, elapsed_s: float) -> None:
    """Print findings for a person: what is fine in one line each, the rest with its price and its remedy."""
    colored = out.isatty()
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        mark = _MARKS[finding.status]
        if colored:
            mark = f"\033[{_COLORS[finding.status]}m{mark}\033[0m"
        first, *more = finding.found.splitlines() or [""]
        print(f"{mark} {finding.name:<{min(width, 28)}} {first}", file=out)
        for line in more:
            print(textwrap.indent(line, " " * 10), file=out)
        if finding.status != "ok":
            print(f"{'':10}{finding.cost}", file=out)
            if finding.mend:
                print(f"{'':10}-> {finding.mend}", file=out)
    counts = {status: sum(finding.status == status for finding in findings) for status in ("failure", "warning")}
    words = [f"{number} {status}{'s' if number != 1 else ''}" for status, number in counts.items() if number]
    print(f"{', '.join(words) or 'nothing stands in the way of a run'} ({elapsed_s:.1f} s)", file=out)


def _extensions(subject: Subject) -> Path:
    folder = subject.environment.get("TORCH_EXTENSIONS_DIR")
    return Path(folder) if folder else Path.home() / ".cache" / "torch_extensions"


def _listed(result: Finding | list[Finding]) -> Iterator[Finding]:
    yield from [result] if isinstance(result, Finding) else result
