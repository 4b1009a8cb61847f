"""Hardware: what data sheets say of the devices that the planner knows, and how much of it a step is assumed to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Assumptions, round and not measured: shares of a data sheet's numbers, and times that no data sheet has."""

    memory: float = 0.9  # the rest is for the driver, communicators and fragments
    flops: float = 0.5  # of matrix products
    bandwidth: float = 0.75  # of memory
    link: float = 0.75  # of what leads to the other devices
    collective_s: float = 10e-6  # a collective that sends nothing
    hop_s: float = 500e-6  # a step's way through the server, from stage to stage


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device, by its data sheet: dense products (no sparsity), and one direction of its link."""

    name: str
    memory_bytes: int
    flops_16: float  # a second, in bfloat16 or float16
    flops_32: float  # a second, in float32
    bandwidth: float  # bytes a second, of its memory
    link: float  # bytes a second, each way, to the other devices of its host
    is_gpu: bool = True
    reach: Reach = Reach()

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_bytes * self.reach.memory)

    def flops(self, item_bytes: int) -> float:
        """Reached a second with numbers of this size."""
        return self.reach.flops * (self.flops_16 if item_bytes == 2 else self.flops_32)


MIB, GIB = 1 << 20, 1 << 30

DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        device.name: device
        for device in (
            Device(name="H100", memory_bytes=80 * GIB, flops_16=989e12, flops_32=67e12, bandwidth=3.35e12, link=450e9),  # SXM
            Device(name="H200", memory_bytes=141 * GIB, flops_16=989e12, flops_32=67e12, bandwidth=4.8e12, link=450e9),
            Device(name="A100", memory_bytes=80 * GIB, flops_16=312e12, flops_32=19.5e12, bandwidth=2.04e12, link=300e9),  # SXM
            Device(name="L40S", memory_bytes=48 * GIB, flops_16=362e12, flops_32=91.6e12, bandwidth=0.864e12, link=32e9),  # PCIe 4
            # No data sheet: a socket of a server to its order of magnitude, with a process a rank that share its memory.
            Device(name="CPU", memory_bytes=64 * GIB, flops_16=2e12, flops_32=2e12, bandwidth=0.2e12, link=10e9, is_gpu=False),
        )
    }
)
