"""One of two processes that try what a run does first: import torch, meet, and add up a tensor.

    python -m megatron.doctor.probe RANK STORE_FILE DEVICE

Prints one JSON object. Invariant: ends within its time limit, or is ended by `collective`.
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from typing import Any

ELEMENTS = 1 << 16
TIMEOUT_S = 30.0


def main(rank: int, store: str, device: str) -> None:
    """Try it as `rank` of two."""
    started = time.perf_counter()
    import torch
    import torch.distributed as dist

    facts: dict[str, Any] = {"import_s": time.perf_counter() - started, "torch": torch.__version__}
    facts["cuda_build"] = torch.version.cuda
    facts["gpus"] = [] if device == "cpu" else _gpus()
    backend = "nccl" if len(facts["gpus"]) >= 2 else "gloo"
    place = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    limit = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=2, timeout=limit)
    tensor = torch.full((ELEMENTS,), float(rank + 1), device=place)
    dist.all_reduce(tensor)
    started = time.perf_counter()
    for _ in range(10):
        dist.all_reduce(tensor)
    total = float(tensor[0].item())
    facts |= {"backend": backend, "all_reduce_s": (time.perf_counter() - started) / 10}
    # 3 after the first, doubled ten times.
    facts["right"] = total == 3.0 * 2**10 and bool((tensor == total).all())
    facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if facts["gpus"] else None
    dist.destroy_process_group()
    print(json.dumps(facts), flush=True)


def _gpus() -> list[dict[str, Any]]:
    """Each GPU, tried with one product of matrices."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpu: dict[str, Any] = {"name": properties.name, "bytes": properties.total_memory}
        try:
            ones = torch.ones(256, 256, device=torch.device("cuda", index))
            gpu["works"] = float((ones @ ones)[0, 0].item()) == 256.0
            gpu["free"] = torch.cuda.mem_get_info(index)[0]
            gpu["bf16"] = torch.cuda.is_bf16_supported()
        except RuntimeError as error:
            gpu |= {"works": False, "why": str(error).splitlines()[0]}
        gpus.append(gpu)
    return gpus


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
