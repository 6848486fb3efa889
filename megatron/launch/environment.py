"""Which environment variables go to the other hosts, what `.deepspeed_env` adds, and what is never shown.

Reads the environment and one file. Invariant: a value that may be a secret appears in no output of this module's
`shown` form, and nothing here puts a value on a command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from megatron.common.errors import LaunchError

# What libraries of a training run read. Everything else can be named in .deepspeed_env.
# fmt: off
PREFIXES = (
    "AWS_", "CCL_", "COMET_", "CONDA_", "CUBLAS_", "CUDA_", "CUDNN_", "DATASETS_", "DEEPSPEED_", "DS_", "FI_",
    "GLOO_", "HABANA_", "HCCL_", "HF_", "HIP_", "HSA_", "I_MPI_", "KMP_", "LC_", "MEGATRON_", "MIOPEN_", "MKL_",
    "MLFLOW_", "MV2_", "NCCL_", "NEBULA", "NEPTUNE_", "NUMEXPR_", "NVIDIA_", "NVTE_", "OMP_", "OPENBLAS_", "PYTHON",
    "PYTORCH_", "RCCL_", "ROCM_", "ROCR_", "SSL_", "TIKTOKEN_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TRITON_",
    "UCX_", "WANDB_", "XDG_CACHE_", "XLA_",
)
NAMES = frozenset((
    "ALL_PROXY", "CURL_CA_BUNDLE", "DATA_DIR", "HTTPS_PROXY", "HTTP_PROXY", "LANG", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "LOGLEVEL", "MAX_JOBS", "NO_PROXY", "PATH", "REQUESTS_CA_BUNDLE", "TZ", "VIRTUAL_ENV", "all_proxy", "http_proxy",
    "https_proxy", "no_proxy",
))
# These say which devices or processes this host uses; each host has its own.
LOCAL = frozenset((
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "MEGATRON_PARENT_PID", "MEGATRON_REMOVE_CONFIG",
    "MEGATRON_SWITCHED_PYTHON", "NVIDIA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
))
# fmt: on
ENV_FILE = ".deepspeed_env"
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|PRIVATE", re.IGNORECASE)
# An address with a user's password in it, as in a proxy: scheme://user:password@host
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def exported(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of this process that a run's other hosts need."""
    return {
        name: value
        for name, value in environment.items()
        if name not in LOCAL and (name in NAMES or name.startswith(PREFIXES))
    }


def read_env_file(environment: Mapping[str, str]) -> dict[str, str]:
    """What `.deepspeed_env` sets: that of the home folder, then that of this folder. DS_ENV_FILE names another file.

    Raises: LaunchError naming the line that is not `NAME=VALUE`.
    """
    named = environment.get("DS_ENV_FILE", ENV_FILE)
    places = [Path(named)] if os.path.isabs(named) else [Path.home() / named, Path.cwd() / named]
    values: dict[str, str] = {}
    for path in dict.fromkeys(places):
        if path.is_file():
            values |= _parse(path)
    return values


def _parse(path: Path) -> dict[str, str]:
    values = {}
    for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = raw.strip().removeprefix("export ").strip()
        if not line or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name.strip()):
            # Not the line itself: it may hold a secret.
            raise LaunchError(f"{path}:{number}: this line is not of the form NAME=VALUE.")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[name.strip()] = value
    return values


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is nobody's business."""
    return _SECRET.search(name) is not None


def shown(name: str, value: str) -> str:
    """The value as it may be printed."""
    return "***" if is_secret(name) else _PASSWORD.sub("***", value)
