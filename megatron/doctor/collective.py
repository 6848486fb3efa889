"""torch, the GPUs and communication, tried by two processes that add up a tensor.

Invariant: both processes have ended when the check returns.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.common.devices import count_gpus
from megatron.doctor.finding import Finding, Subject, size

TIMEOUT_S = 90.0
ROOT = Path(__file__).resolve().parents[2]


def check_torch(
    subject: Subject,
    *,
    python: Sequence[str] = (sys.executable,),
    timeout_s: float = TIMEOUT_S,
    gpus: int | None = None,
) -> list[Finding]:
    """Import torch in two processes, look at the GPUs, and add up a tensor over gloo, or NCCL with two GPUs or more."""
    device = "cpu" if subject.device == "cpu" else "auto"
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        commands = [[*python, "-m", "megatron.doctor.probe", str(rank), f"{folder}/store", device] for rank in range(2)]
        answers = _run(commands, subject, timeout_s)
    facts, errors = [answer for answer, _ in answers if answer], [error for _, error in answers if error]
    if len(facts) < 2:
        return [_failed(errors, subject)]
    first: dict[str, Any] = facts[0]
    findings = [_torch(first, subject, count_gpus(subject.environment) if gpus is None else gpus)]
    findings += [_gpu(index, gpu) for index, gpu in enumerate(first["gpus"])]
    name = f"all-reduce ({first['backend']})"
    if all(fact["right"] for fact in facts):
        findings.append(Finding(name, "ok", f"two processes agree, {first['all_reduce_s'] * 1e3:.2f} ms for 262 kB"))
    else:
        cost = "gradients would be wrong"
        findings.append(
            Finding(
                name, "failure", "two processes got a wrong sum", cost, "try NCCL_P2P_DISABLE=1, and check the driver"
            )
        )
    return findings


def _run(commands: list[list[str]], subject: Subject, timeout_s: float) -> list[tuple[dict[str, Any] | None, str]]:
    """What each process printed, or what it said at its end."""
    environment = {**subject.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    answers: list[tuple[dict[str, Any] | None, str]] = []
    try:
        for process in processes:
            try:
                out, err = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                answers.append((None, f"no answer in {timeout_s:.0f} s"))
                continue
            facts = None
            with contextlib.suppress(ValueError, IndexError):
                facts = json.loads(out.splitlines()[-1])
            lines = [line for line in err.splitlines() if line.strip()]
            said = lines[-1] if lines else f"ended with code {process.returncode}"
            answers.append((facts, "" if facts else said))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return answers


def _failed(errors: list[str], subject: Subject) -> Finding:
    said = errors[0] if errors else "no answer"
    if "No module named" in said:
        return Finding(
            "torch",
            "failure",
            said,
            "nothing can be trained",
            f"{sys.executable} -m pip install -r requirements/requirements.txt",
        )
    mend = (
        "python -X faulthandler -m megatron.doctor.probe 0 /tmp/store cpu   (in two shells, ranks 0 and 1, to see more)"
    )
    if "interface" in said.lower() or "GLOO_SOCKET_IFNAME" in subject.environment or "ifname" in said.lower():
        mend = "unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME, or name an interface of `ip address`"
    return Finding("all-reduce", "failure", said, "no run of several processes starts", mend)


def _torch(facts: dict[str, Any], subject: Subject, gpus: int) -> Finding:
    found = f"{facts['torch']}, imported in {facts['import_s']:.1f} s"
    if facts["gpus"]:
        return Finding("torch", "ok", f"{found}, CUDA {facts['cuda_build']}, NCCL {facts['nccl']}")
    if subject.device == "cpu":
        return Finding("torch", "ok", found)
    if gpus and not facts["cuda_build"]:
        cost = f"{gpus} GPU{'s' if gpus > 1 else ''} of this host are not used"
        mend = f"{sys.executable} -m pip install --force-reinstall --no-deps torch   (the build with CUDA)"
        return Finding("torch", "failure", f"{found}, built without CUDA", cost, mend)
    if gpus:
        cost = f"{gpus} GPU{'s' if gpus > 1 else ''} of this host are not used"
        return Finding(
            "torch",
            "failure",
            f"{found}, CUDA does not start",
            cost,
            "nvidia-smi, and a driver for CUDA {}".format(facts["cuda_build"]),
        )
    if subject.device == "cuda":
        cost = "device: cuda cannot start here"
        return Finding("torch", "failure", f"{found}, no GPU found", cost, "device: auto, or a host with GPUs")
    cost = "no GPU found: models train on the CPU, some hundred times slower"
    return Finding("torch", "note", found, cost, "nothing, for small models")


def _gpu(index: int, gpu: dict[str, Any]) -> Finding:
    name = f"GPU {index}"
    if not gpu["works"]:
        mend = f"nvidia-smi -q -i {index}; leave it out with CUDA_VISIBLE_DEVICES"
        return Finding(name, "failure", f"{gpu['name']}: {gpu.get('why', 'computes wrongly')}", "runs on it fail", mend)
    found = f"{gpu['name']}, {size(gpu['free'])} of {size(gpu['bytes'])} free"
    if gpu["free"] < 0.8 * gpu["bytes"]:
        return Finding(
            name, "warning", found, "another program holds memory on it", "nvidia-smi, and end what you do not need"
        )
    if not gpu["bf16"]:
        return Finding(name, "warning", found, "precision: bfloat16 is emulated", "precision: fp16")
    return Finding(name, "ok", found)
