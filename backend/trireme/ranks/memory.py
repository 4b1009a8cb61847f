"""Memory: how many pages and snapshots a rank has room for, and what the rest is taken by. On a GPU it is measured by steps that
mean nothing."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.core.step import PAGE
from trireme.layers.block import PerRequest, PerToken

_CPU_BYTES = 1 << 30  # of pages, and of snapshots at the most, where nothing is said
_GRAPH_BYTES = 16 << 20  # what CUDA keeps of one graph, above its tensors
_SNAPSHOTS = 4  # snapshots take at most one part in so many of what pages and they share, where nothing is said
_FRAGMENTS = 2  # one part in so many of a step's activations may be lost between its tensors
_BOUNDLESS = 1 << 24  # pages of a stage that keeps none: another one says how many there are


class Sizes(NamedTuple):
    """Bytes that all layers of a rank keep together; 0 where none keeps any."""

    page: int
    slot: int  # a sequence's states and the rows that it may hold
    snapshot: int  # a copy of its states

    @classmethod
    def of(cls, keeps: Sequence[PerToken | PerRequest], num_held: int) -> Sizes:
        """`num_held`: rows that a slot may hold."""
        states = [keep for keep in keeps if isinstance(keep, PerRequest)]
        snapshot = sum(keep.bytes_per_state for keep in states)
        return cls(
            page=sum(keep.bytes_per_page for keep in keeps if isinstance(keep, PerToken)),
            slot=snapshot + sum(keep.bytes_held(num_held) for keep in states),
            snapshot=snapshot,
        )


@dataclass(frozen=True)
class Room:
    """A rank's memory in bytes."""

    pages: int
    snapshots: int = 0
    states: int = 0  # of all slots
    total: int = 0  # of the GPU; 0 on a CPU, where nothing is measured
    weights: int = 0
    activations: int = 0  # at the peak of the largest step
    graphs: int = 0  # set aside for them
    mailbox: int = 0  # see parallel/mail.py

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "states": self.states,
            "snapshots": self.snapshots,
            "keys and values": self.pages,
            "activations": self.activations,
            "rows by mail": self.mailbox,
            "graphs up to": self.graphs,
        }
        told = ", ".join(f"{name} {_gib(num_bytes)}" for name, num_bytes in parts.items() if num_bytes)
        return f"of {_gib(self.total)}: {told}" if self.total else told


def check_states(settings: Settings, device: torch.device, sizes: Sizes, stage: int) -> None:
    """Refusal where a GPU has no room for the states of all slots, which are there before anything is measured."""
    if device.type == "cpu":
        return
    needed, free = settings.max_num_seqs * sizes.slot, torch.cuda.mem_get_info(device)[0]
    if needed > free:
        raise Refusal(
            f"stage_{stage} has no room for the states of {settings.max_num_seqs} sequences",
            why=f"they take {_gib(needed)}, and {_gib(free)} are free beside the weights",
            fix="lower max_num_seqs, or spread the model over more ranks",
        )


def find_room(
    settings: Settings,
    device: torch.device,
    sizes: Sizes,
    *,
    largest: Callable[[], None],
    decode: Callable[[], None],
    num_graphs: int,
    mailbox_bytes: int,
) -> Room:
    """With states of all slots in place. `largest` and `decode` compute the steps of the most rows, and those of the most sequences
    that graphs hold."""
    states = settings.max_num_seqs * sizes.slot
    if device.type == "cpu":
        return Room(settings.kv_cache_memory_bytes or _CPU_BYTES, _snapshots(settings, sizes, _CPU_BYTES), states)
    weights = torch.cuda.memory_allocated(device) - states - mailbox_bytes
    activations = _peak(largest, device)
    graphs = _peak(decode, device) + num_graphs * _GRAPH_BYTES if num_graphs else 0
    free, total = torch.cuda.mem_get_info(device)
    left = int(total * settings.gpu_memory_utilization) - (total - free) - activations - graphs
    snapshots = _snapshots(settings, sizes, max(0, left) // _SNAPSHOTS)
    pages = settings.kv_cache_memory_bytes or left - snapshots
    return Room(pages, snapshots, states, total, weights, activations, graphs, mailbox_bytes)


def _snapshots(settings: Settings, sizes: Sizes, most_bytes: int) -> int:
    """Bytes of whole snapshots: as said, else as many as slots where they take no more than most_bytes."""
    if not sizes.snapshot or not settings.enable_prefix_caching:
        return 0
    said = settings.state_cache_memory_bytes
    num_bytes = min(most_bytes, settings.max_num_seqs * sizes.snapshot) if said is None else said
    return num_bytes // sizes.snapshot * sizes.snapshot


def num_pages(room: Room, sizes: Sizes, settings: Settings, stage: int) -> int:
    """Refusal where there is no room for any."""
    if settings.num_pages:
        return settings.num_pages
    if not sizes.page:
        return _BOUNDLESS
    if room.pages < sizes.page:
        raise Refusal(
            f"stage_{stage} has no room for keys and values: {room}",
            why=f"a page of {PAGE} tokens takes {sizes.page} bytes",
            fix="raise kv_cache_memory_bytes"
            if settings.kv_cache_memory_bytes or not room.total
            else f"raise gpu_memory_utilization, lower max_num_batched_tokens{' or max_num_seqs' if room.states else ''}, "
            "or spread the model over more ranks",
        )
    return room.pages // sizes.page


def num_snapshots(room: Room, sizes: Sizes) -> int | None:
    """None where no layer keeps states."""
    return room.snapshots // sizes.snapshot if sizes.snapshot else None


def stock(room: Room, edge_bytes: int, device: torch.device) -> None:
    """Take what steps compute in once, as one block of which torch's allocator then cuts each tensor, `edge_bytes` of it for rows on
    their way to another stage. Steps of a few rows more than any before would else each take new memory until none is left, and
    what lies about is given back only when the device has done all it was told, for which other stages would wait. A new capture
    of graphs gives the block back, so it is looked after in every epoch."""
    if device.type == "cpu":
        return
    num_bytes = room.activations + room.activations // _FRAGMENTS + edge_bytes
    if torch.cuda.mem_get_info(device)[0] > num_bytes:
        torch.empty(num_bytes, dtype=torch.uint8, device=device)


def unstock(device: torch.device) -> None:
    """Give back what nobody uses. Before an epoch's groups are formed: boxes that they have until its end would be cut out of the block,
    which then is not whole, and another one would be taken."""
    if device.type != "cpu":
        torch.cuda.empty_cache()


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
