"""How many GPUs this host offers, found out without importing torch.

Says nothing of whether torch can use them. Invariant: asking starts no GPU context and takes milliseconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path


def count_gpus(environment: Mapping[str, str] | None = None, device_folder: Path = Path("/dev")) -> int:
    """GPUs that a process started here would see.

    DS_ACCELERATOR=cpu means none, CUDA_VISIBLE_DEVICES limits them, as they do for torch and DeepSpeed.
    """
    environment = os.environ if environment is None else environment
    if environment.get("DS_ACCELERATOR") == "cpu":
        return 0
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        chosen = []
        for name in visible.split(","):
            if not name.strip() or name.strip() == "-1":
                break
            chosen.append(name.strip())
        if not chosen:
            return 0
        # MIG slices and UUIDs have no device file of their own, so the list itself is the count.
        if not all(name.isdigit() for name in chosen):
            return len(chosen) if _count_installed(device_folder) else 0
        return min(len(chosen), _count_installed(device_folder))
    return _count_installed(device_folder)


def _count_installed(device_folder: Path) -> int:
    files = [path for path in device_folder.glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    if files:
        return len(files)
    # WSL has no /dev/nvidia*; its one device file tells that asking nvidia-smi is worth the time.
    if (device_folder / "dxg").exists() and shutil.which("nvidia-smi"):
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
        return sum(line.startswith("GPU ") for line in answer.stdout.splitlines())
    return 0


def count_cores() -> int:
    """CPU cores that this process may use: its affinity, within the container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
