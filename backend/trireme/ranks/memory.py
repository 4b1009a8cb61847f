"""Memory: how many pages a rank has room for, and what the rest is taken by. On a GPU it is measured by steps that mean nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.core.step import PAGE

_CPU_BYTES = 1 << 30  # of pages, where nothing is said
_GRAPH_BYTES = 16 << 20  # what CUDA keeps of one graph, above its tensors


@dataclass(frozen=True)
class Room:
    """A rank's memory in bytes."""

    pages: int
    total: int = 0  # of the GPU; 0 on a CPU, where nothing is measured
    weights: int = 0
    activations: int = 0  # at the peak of the largest step
    graphs: int = 0  # set aside for them

    def __str__(self) -> str:
        if not self.total:
            return f"{_gib(self.pages)} for keys and values"
        parts = {"weights": self.weights, "keys and values": self.pages, "activations": self.activations, "graphs up to": self.graphs}
        return f"of {_gib(self.total)}: " + ", ".join(f"{name} {_gib(num_bytes)}" for name, num_bytes in parts.items())


def find_room(
    settings: Settings, device: torch.device, *, largest: Callable[[], None], decode: Callable[[], None], num_graphs: int
) -> Room:
    """`largest` and `decode` compute a step of the most rows, and one of the most sequences."""
    if device.type == "cpu":
        return Room(settings.kv_cache_memory_bytes or _CPU_BYTES)
    weights = torch.cuda.memory_allocated(device)
    activations = _peak(largest, device)
    graphs = _peak(decode, device) + num_graphs * _GRAPH_BYTES if num_graphs else 0
    free, total = torch.cuda.mem_get_info(device)
    pages = settings.kv_cache_memory_bytes or int(total * settings.gpu_memory_utilization) - (total - free) - activations - graphs
    return Room(pages, total, weights, activations, graphs)


def num_pages(room: Room, page_bytes: int, settings: Settings, stage: int) -> int:
    """Refusal where there is no room for any."""
    if room.pages < page_bytes:
        raise Refusal(
            f"stage_{stage} has no room for keys and values: {room}",
            why=f"a page of {PAGE} tokens takes {page_bytes} bytes",
            fix="raise kv_cache_memory_bytes"
            if settings.kv_cache_memory_bytes or not room.total
            else "raise gpu_memory_utilization, lower max_num_batched_tokens, or spread the model over more ranks",
        )
    return room.pages // page_bytes


def _peak(compute: Callable[[], None], device: torch.device) -> int:
    """Bytes that are allocated at its height. The first time, which loads kernels and makes workspaces that stay, does not count."""
    compute()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    compute()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"
