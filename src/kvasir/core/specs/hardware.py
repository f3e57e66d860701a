"""Accelerators as seven numbers and two efficiencies. Numbers from the makers' data sheets."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from kvasir.core.specs.base import Spec

PCIE_4_X4: Final = 16e9 * 128 / 130 / 8 * 4  # bytes a second: 16 GT/s a lane, 128b/130b coding
PCIE_4_X16: Final = 4 * PCIE_4_X4
PCIE_5_X16: Final = 2 * PCIE_4_X16


class HardwareSpec(Spec):
    """One accelerator.

    `flops` is dense fp16/bf16 per second, `memory_bandwidth` and link rates are bytes per second in
    one direction; so are `host_bandwidth`, between its memory and the host's (PCIe x16), and
    `disk_bandwidth`, of its share of a local disk (one NVMe drive at PCIe 4.0 x4). Efficiencies are
    the shares of peak that long kernels and copies reach.
    """

    name: str
    flops: float = Field(gt=0)
    memory_bytes: int = Field(gt=0)
    memory_bandwidth: float = Field(gt=0)
    nvlink_bandwidth: float = Field(gt=0)
    nic_bandwidth: float = Field(gt=0)
    flops_efficiency: float = Field(default=0.6, gt=0, le=1)
    bandwidth_efficiency: float = Field(default=0.8, gt=0, le=1)
    step_overhead_s: float = Field(default=0.003, ge=0)
    power_w: float | None = None
    host_bandwidth: float = Field(default=PCIE_4_X16, gt=0)
    disk_bandwidth: float = Field(default=PCIE_4_X4, gt=0)


GIB = 1024**3
HARDWARE: Final[dict[str, HardwareSpec]] = {
    h.name: h
    for h in (
        HardwareSpec(
            name="a100", flops=312e12, memory_bytes=80 * GIB, memory_bandwidth=2.039e12,
            nvlink_bandwidth=300e9, nic_bandwidth=25e9, power_w=400,
        ),
        HardwareSpec(
            name="h100", flops=989e12, memory_bytes=80 * GIB, memory_bandwidth=3.35e12,
            nvlink_bandwidth=450e9, nic_bandwidth=50e9, power_w=700, host_bandwidth=PCIE_5_X16,
        ),
        HardwareSpec(
            name="h200", flops=989e12, memory_bytes=141 * GIB, memory_bandwidth=4.8e12,
            nvlink_bandwidth=450e9, nic_bandwidth=50e9, power_w=700, host_bandwidth=PCIE_5_X16,
        ),
        HardwareSpec(
            name="b200", flops=2250e12, memory_bytes=180 * GIB, memory_bandwidth=8e12,
            nvlink_bandwidth=900e9, nic_bandwidth=50e9, power_w=1000, host_bandwidth=PCIE_5_X16,
        ),
        HardwareSpec(
            name="a40", flops=149.7e12, memory_bytes=48 * GIB, memory_bandwidth=0.696e12,
            nvlink_bandwidth=56.25e9, nic_bandwidth=12.5e9, power_w=300,
        ),
        HardwareSpec(
            name="rtx3090ti", flops=160e12, memory_bytes=24 * GIB, memory_bandwidth=1.008e12,
            nvlink_bandwidth=56.25e9, nic_bandwidth=3.125e9, power_w=450,
        ),
        HardwareSpec(
            name="cpu", flops=0.15e12, memory_bytes=4 * GIB, memory_bandwidth=10e9,
            nvlink_bandwidth=5e9, nic_bandwidth=1.25e9, step_overhead_s=0.001,
            host_bandwidth=5e9, disk_bandwidth=2e9,
        ),
    )
}  # fmt: skip
