"""How fast a run is: tokens, samples and floating-point operations per second, and the share of the device's peak.

Only time that the caller hands over counts, so validation and saving do not blur it. Invariant: where the peak of a
device is not known for certain, there is no utilisation, rather than a wrong one.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

# Dense matrix peaks in TFLOP/s for (bf16, fp16), by whole words of the name that the driver reports; first match wins.
# Source: the vendors' data sheets, without sparsity; GeForce values are those with fp32 accumulation.
_PEAKS: tuple[tuple[tuple[str, ...], float | None, float | None], ...] = (
    (("B200",), 2250.0, 2250.0),
    (("GH200",), 989.5, 989.5),
    (("H200", "NVL"), 835.5, 835.5),
    (("H200",), 989.5, 989.5),
    (("H100", "NVL"), 835.5, 835.5),
    (("H100", "PCIe"), 756.0, 756.0),
    (("H100", "HBM3"), 989.5, 989.5),
    (("A100",), 312.0, 312.0),
    (("A800",), 312.0, 312.0),
    (("A40",), 149.7, 149.7),
    (("A30",), 165.0, 165.0),
    (("A10",), 125.0, 125.0),
    (("L40S",), 362.05, 362.05),
    (("L40",), 181.05, 181.05),
    (("L4",), 121.0, 121.0),
    (("RTX", "4090"), 165.2, 165.2),
    (("RTX", "3090"), 71.0, 71.0),
    (("V100", "SXM2"), None, 125.0),
    (("V100", "PCIE"), None, 112.0),
    (("T4",), None, 65.0),
    (("MI300X",), 1307.4, 1307.4),
)
# Variants whose peak differs from that of the plain name, or is a slice of it.
_UNSURE = re.compile(r"\b(MIG|Laptop|Mobile|Max-Q|Ti|SUPER|Ada|D)\b", re.IGNORECASE)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Dense matrix peak of one device in FLOP/s; None if the device or the dtype is not in the table.

    device_name: as `torch.cuda.get_device_name` says it. dtype: `bfloat16` or `fp16`; fp32 has several peaks, so none.
    """
    column = {"bfloat16": 0, "bf16": 0, "fp16": 1}.get(dtype)
    if column is None or _UNSURE.search(device_name):
        return None
    words = set(re.split(r"[\s-]+", device_name))
    for name, *peaks in _PEAKS:
        if words.issuperset(name):
            peak = peaks[column]
            return None if peak is None else peak * 1e12
    return None


@dataclass(frozen=True)
class Rates:
    """Speed over the last steps.

    Units: tokens, samples and steps per second over all ranks; tokens_per_cpu_s per second of processor time of one
    rank, counting that rank's share of the tokens; flops_per_s of one device; mfu its share of the peak, 0 to 1.
    """

    tokens_per_s: float
    samples_per_s: float
    steps_per_s: float
    step_s: float
    tokens_per_cpu_s: float | None
    flops_per_s: float | None
    mfu: float | None


class Throughput:
    """A moving mean over the last `window_steps` steps.

    tokens_per_step, samples_per_step: over all ranks. flops_per_token: forward and backward of the whole model, without
    recomputation. peak_flops: of one device, in FLOP/s.
    """

    def __init__(
        self,
        tokens_per_step: int,
        samples_per_step: int,
        num_devices: int = 1,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        window_steps: int = 20,
    ) -> None:
        self._tokens = tokens_per_step
        self._samples = samples_per_step
        self._devices = num_devices
        self._flops_per_token = flops_per_token
        self._peak = peak_flops
        self._steps: deque[tuple[float, float | None]] = deque(maxlen=window_steps)

    def add(self, elapsed_s: float, cpu_s: float | None = None) -> Rates:
        """Count a step that took `elapsed_s` of wall time and `cpu_s` of this process's processor time."""
        self._steps.append((elapsed_s, cpu_s))
        count = len(self._steps)
        # A clock may be too coarse for a tiny step; a rate must still be a number.
        seconds = max(1e-9, sum(wall for wall, _ in self._steps))
        busy = [cpu for _, cpu in self._steps if cpu is not None]
        tokens_per_s = self._tokens * count / seconds
        flops = None if self._flops_per_token is None else tokens_per_s * self._flops_per_token / self._devices
        return Rates(
            tokens_per_s=tokens_per_s,
            samples_per_s=self._samples * count / seconds,
            steps_per_s=count / seconds,
            step_s=seconds / count,
            tokens_per_cpu_s=self._tokens / self._devices * len(busy) / max(1e-9, sum(busy)) if busy else None,
            flops_per_s=flops,
            mfu=None if flops is None or self._peak is None else flops / self._peak,
        )
