"""Devices that a plan can be made for: memory, and the published rate of dense matrix products in 16 bits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        memory_gib: its memory, in GiB.
        tflops: 10^12 floating-point operations per second in dense bfloat16 products (float16 where the device has no
            bfloat16), as its data sheet states them; 0: not known.
        kind: ``cuda`` or ``cpu``.
    """

    name: str
    memory_gib: float
    tflops: float = 0.0
    kind: str = "cuda"


# NVIDIA's data sheets, without sparsity. Rates of consumer cards are those with sums in float32.
DEVICES = {
    device.name: device
    for device in (
        Device("B200", 180, 2250), Device("H200", 141, 989), Device("H100", 80, 989), Device("A100", 80, 312),
        Device("A100-40GB", 40, 312), Device("L40S", 48, 362), Device("A6000", 48, 155), Device("V100", 32, 125),
        Device("5090", 32, 210), Device("A10", 24, 125), Device("L4", 24, 121), Device("4090", 24, 165),
        Device("3090", 24, 71), Device("T4", 16, 65),
    )
}  # fmt: skip
DEFAULT = "A100"

RESERVE_GIB = 1.0
"""Memory that tensors cannot use: of a GPU for CUDA's context, its libraries and the allocator's gaps; of a host for
Python and its libraries. Assumed."""


def find_device(name: str | None, use_cpu: bool = False) -> Device:
    """Return a device of the table by name, else the one of this machine, else the default.

    Raises:
        ConfigError: a name that is not in the table.
    """
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name is not None and name.lower() not in known:
        raise ConfigError(f"--device {name} is not in the table of devices", f"Give one of {', '.join(DEVICES)}")
    if name is not None and use_cpu:
        raise ConfigError(f"--device {name} and --use_cpu are two devices", "Give one of them")
    if use_cpu:
        return Device("CPU", _host_memory() / GIB, kind="cpu")
    return known[name.lower()] if name is not None else _present_device() or DEVICES[DEFAULT]


def _present_device() -> Device | None:
    """Return this machine's GPU with the memory that it has; ``None`` without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    rate = next((row.tflops for key, row in DEVICES.items() if key.lower() in properties.name.lower()), 0.0)
    return Device(properties.name, properties.total_memory / GIB, rate)


def _host_memory() -> int:
    """Return the bytes of memory that processes may use here: the machine's, or the limit of its control group."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total
