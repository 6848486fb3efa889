"""Python and the packages, by what is installed; nothing heavy is imported.

Invariant: the versions asked for are those of the requirements files.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron.common.devices import count_gpus
from megatron.doctor.finding import Finding, Subject

ROOT = Path(__file__).resolve().parents[2]
OLDEST, NEWEST = (3, 11), (3, 13)
# Optional packages: what is not there without them, and the file that brings them.
OPTIONAL = {
    "lm_eval": ("evaluate.py scores no tasks", "requirements-eval.txt"),
    "wandb": ("use_wandb does not work", "requirements-wandb.txt"),
    "comet_ml": ("use_comet does not work", "requirements-comet.txt"),
    "tensorboardX": ("tensorboard_dir does not work", "requirements-tensorboard.txt"),
    "matplotlib": ("tools/plot_losses.py does not work", "requirements-plot.txt"),
    "zstandard": ("corpora in .zst cannot be read", "requirements-data.txt"),
    "sentencepiece": ("SPMTokenizer does not work", "requirements-tokenizers.txt"),
    "tiktoken": ("TiktokenTokenizer does not work", "requirements-tokenizers.txt"),
}


def check_python(version: tuple[int, int] = sys.version_info[:2], prefix: str = sys.prefix) -> Finding:
    """The interpreter."""
    found = f"{'.'.join(map(str, version))} in {prefix}"
    if OLDEST <= version <= NEWEST:
        return Finding("Python", "ok", found)
    wanted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    return Finding("Python", "failure", found, f"this project is made for {wanted}", "make PYTHON=/path/to/python3.12")


def required_versions(file: Path = ROOT / "requirements" / "requirements.txt") -> dict[str, str]:
    """Package -> version of a requirements file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    matches = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {match[1]: match[2] for match in matches if match}


def installed_version(package: str) -> str | None:
    """The version of an installed package, without its local part (+cpu)."""
    try:
        return importlib.metadata.version(package).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def check_packages(required: Mapping[str, str] | None = None) -> list[Finding]:
    """What every run needs, at the versions that are tested."""
    wanted = required_versions() if required is None else required
    have = {package: installed_version(package) for package in wanted}
    own = ROOT / ".venv" / "bin" / "python"
    mend = f"{sys.executable} -m pip install -r requirements/requirements.txt"
    if own.exists() and not Path(sys.prefix).samefile(own.parents[1]):
        mend = f"source {own.parents[1]}/bin/activate   (the environment of make), or {mend}"
    missing = [package for package, version in have.items() if version is None]
    other = [
        f"{package} {version} (tested: {wanted[package]})"
        for package, version in have.items()
        if version not in (None, wanted[package])
    ]
    findings = []
    if missing:
        findings.append(
            Finding("packages", "failure", f"missing: {', '.join(missing)}", "nothing can be started", mend)
        )
    if other:
        cost = "other versions than the tested ones; they may work"
        findings.append(Finding("packages", "warning", ", ".join(other), cost, mend))
    present = ", ".join(f"{package} {version}" for package, version in have.items() if version)
    return findings or [Finding("packages", "ok", present)]


def check_optional(packages: Iterable[str] = OPTIONAL) -> list[Finding]:
    """What single features need."""
    missing = [name for name in packages if installed_version(name) is None]
    findings = [
        Finding(
            name,
            "note",
            "not installed",
            OPTIONAL[name][0],
            f"{sys.executable} -m pip install -r requirements/{OPTIONAL[name][1]}",
        )
        for name in missing
    ]
    there = [name for name in packages if name not in missing]
    return [*findings, *([Finding("optional packages", "ok", ", ".join(there))] if there else [])]


def check_flash_attention(subject: Subject, gpus: int | None = None) -> Finding:
    """flash-attn, which only serves GPUs."""
    version = installed_version("flash_attn")
    if version is not None:
        return Finding("flash-attn", "ok", version)
    gpus = count_gpus(subject.environment) if gpus is None else gpus
    if subject.device == "cpu" or not gpus:
        return Finding("flash-attn", "ok", "not installed, and of no use without a GPU")
    cost = "attention runs on PyTorch's own fused kernels, which are exact and nearly as fast"
    return Finding("flash-attn", "note", "not installed", cost, "pip install flash-attn --no-build-isolation")


def check_compiler(subject: Subject) -> list[Finding]:
    """A C++ compiler, where torch.compile on a CPU needs one."""
    if not subject.torch_compile:
        return []
    compiler = next(
        (name for name in (subject.environment.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name)),
        None,
    )
    if compiler is not None:
        return [Finding("C++ compiler", "ok", compiler)]
    return [
        Finding(
            "C++ compiler",
            "failure",
            "none found",
            "torch_compile: true cannot work",
            "apt-get install g++, or torch_compile: false",
        )
    ]


def check_extension_locks(folder: Path, now: float | None = None) -> list[Finding]:
    """Locks that a killed build of a DeepSpeed extension left: every later build waits for ever."""
    stale = [path for path in folder.rglob("lock") if (now or time.time()) - path.stat().st_mtime > 600]
    if not stale:
        return []
    cost = "a program that builds this extension would hang; training here builds none"
    return [Finding("extension locks", "warning", ", ".join(map(str, stale)), cost, f"rm {' '.join(map(str, stale))}")]
