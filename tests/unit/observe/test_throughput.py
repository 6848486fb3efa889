"""Rates by hand-computed values; utilisation only where the peak is certain."""

from __future__ import annotations

import pytest
import torch

from megatron.observe.memory import peak_memory
from megatron.observe.throughput import Throughput, peak_flops


def test_rates_over_a_window():
    meter = Throughput(1200, 12, num_devices=4, flops_per_token=1e6, peak_flops=1e9, window_steps=2)
    meter.add(1000.0, 1000.0)
    meter.add(1.0, 0.5)
    rates = meter.add(3.0, 1.5)
    assert rates.tokens_per_s == pytest.approx(600)
    assert rates.samples_per_s == pytest.approx(6)
    assert rates.steps_per_s == pytest.approx(0.5)
    assert rates.step_s == pytest.approx(2.0)
    assert rates.tokens_per_cpu_s == pytest.approx(300)
    assert rates.flops_per_s == pytest.approx(600 * 1e6 / 4)
    assert rates.mfu == pytest.approx(0.15)


def test_what_is_not_given_is_not_claimed():
    rates = Throughput(10, 1).add(0.0)
    assert rates.tokens_per_cpu_s is None
    assert rates.flops_per_s is None
    assert rates.mfu is None
    assert rates.tokens_per_s > 0
    assert Throughput(10, 1, flops_per_token=5.0).add(1.0).mfu is None


@pytest.mark.parametrize(
    ("name", "dtype", "tflops"),
    [
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "fp16", 756.0),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
    ],
)
def test_known_peaks(name, dtype, tflops):
    assert peak_flops(name, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H200 MIG 1g.18gb", "bfloat16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16"),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16"),
        ("NVIDIA A10G", "bfloat16"),
        ("Tesla T4", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "fp32"),
        ("cpu", "bfloat16"),
        ("NVIDIA H1000", "bfloat16"),
    ],
)
def test_an_unsure_peak_is_none(name, dtype):
    assert peak_flops(name, dtype) is None


def test_peak_memory_sees_a_large_tensor():
    before = peak_memory()
    block = torch.ones(before.resident_bytes // 4 + 2**24)
    after = peak_memory()
    assert after.resident_bytes >= before.resident_bytes
    assert after.resident_bytes >= block.numel() * 4
    assert "GiB of host memory" in str(after)
