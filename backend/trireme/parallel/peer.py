"""Peers: memory of a group's GPUs that all of its ranks see, by which they sum few rows in one kernel, where that is faster than
NCCL. How they meet in it, how far it is faster, and how it ends; the kernel is the op peer_sum's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from trireme.parallel.comm import Group, LinkLost, reach
from trireme.parallel.mapping import Exchange, map_others
from trireme.parallel.timing import device_seconds

_NUM_CELLS = 256  # rows of the largest sum
_SIZES = (1, 4, 16, 64, 128, 256)  # rows at which both ways are timed


class PeerSum(Protocol):
    """The op, as trireme_kernels.peer_sum.op has it."""

    def sum(self, x: torch.Tensor, boxes: Any) -> torch.Tensor: ...

    def sum_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, boxes: Any
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def best(self, values: torch.Tensor, ids: torch.Tensor, boxes: Any) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Boxes:
    """What the op asks for (trireme_kernels.peer_sum.op.Boxes)."""

    place: int
    every: Sequence[torch.Tensor]  # by place; this place's own is in its memory, the others' are mapped
    addresses: torch.Tensor
    turns: torch.Tensor
    given_up: torch.Tensor


class Peers:
    """The group's sums of up to `most` numbers, and the best of what its ranks found. Calls are put on the current stream, and may be
    captured."""

    def __init__(self, boxes: Boxes, op: PeerSum, dtype: torch.dtype, hidden: int, words: torch.cuda.Stream):
        self._boxes, self._op, self.dtype, self.hidden, self._words = boxes, op, dtype, hidden, words
        self.most = _NUM_CELLS * hidden
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=True)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether x is summed this way: the same on all ranks, which bring tensors of one shape."""
        return x.dtype == self.dtype and 0 < x.numel() <= self.most

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """x, summed over the ranks; x itself may be overwritten."""
        return self._op.sum(x, self._boxes)

    def sum_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, hidden] -> (normed, residual + x summed over the ranks)."""
        return self._op.sum_norm(x, residual, weight, eps, self._boxes)

    def best(self, values: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """values float32 [n], ids int64 [n] of tokens -> the highest of each row over the ranks and its id, of equals the lowest."""
        return self._op.best(values, ids, self._boxes)

    def give_up(self) -> None:
        """Kernels that wait for another rank end, within a millisecond, and so do all that come: a kernel cannot be cancelled.
        A rank whose peer was killed is freed by this alone. What they give is nothing."""
        with torch.cuda.stream(self._words):  # a copy: beside kernels that wait another might find no room
            self._boxes.given_up.copy_(self._one, non_blocking=True)


def meet_peers(
    place: int,
    size: int,
    device: torch.device,
    *,
    hidden: int,
    dtype: torch.dtype,
    op: PeerSum,
    words: torch.cuda.Stream,
    exchange: Exchange,
) -> Peers | str:
    """Blocks until all members are here. Or, on all of them, why they do not see each other's memory. `words`: see Collectives.words."""
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    cell = 1 << (hidden - 1).bit_length()
    with torch.cuda.device(device):  # a thread has a device of its own
        box = torch.full((2, size, _NUM_CELLS, cell), torch.iinfo(bits).min, dtype=bits, device=device)
        torch.cuda.synchronize()  # it is empty before anybody knows of it
        mapped = map_others(box, place, size, device, exchange)
        if isinstance(mapped, str):
            return mapped
        every = [mapped.get(other, box) for other in range(size)]
        given_up = torch.zeros(1, dtype=torch.int32, device=device)
        addresses = torch.tensor([*(each.data_ptr() for each in every), given_up.data_ptr()], device=device)
        turns = torch.zeros(_NUM_CELLS, dtype=torch.int32, device=device)
    return Peers(Boxes(place, every, addresses, turns, given_up), op, dtype, hidden, words)


def find_most(peers: Peers, group: Group, device: torch.device, exchange: Exchange, limit_s: float, give_up: Callable[[], bool]) -> str:
    """Set `most` by where the group's own sums begin to be as fast, as place 0 measures it; 0 where they always are. What was found,
    in words. Every member makes the same calls; LinkLost where others do not come, within the time or before `give_up`."""
    ways = {"peers": peers.sum, "NCCL": group.all_reduce}
    found: dict[str, list[float]] = {way: [] for way in ways}

    def wait(event: torch.cuda.Event) -> None:
        reach(event, limit_s, give_up)

    try:
        with torch.cuda.device(device):
            _compile_rest(peers, device)
            for num_rows in _SIZES:
                x = torch.zeros(num_rows, peers.hidden, dtype=peers.dtype, device=device)
                for way, call in ways.items():
                    found[way].append(1e6 * device_seconds(partial(call, x), wait, num_rounds=1))
    except LinkLost:
        peers.give_up()
        group.close()
        raise
    faster = [num_rows for num_rows, own, other in zip(_SIZES, found["peers"], found["NCCL"], strict=True) if own < other]
    rows = max(faster, default=0)
    rows = int(exchange("rows", str(rows).encode())[0])
    peers.most = rows * peers.hidden
    took = ", ".join(f"{way} {' '.join(f'{us:.1f}' for us in times)}" for way, times in found.items())
    return f"up to {rows} rows by peers (us of {' '.join(map(str, _SIZES))} rows: {took})"


def _compile_rest(peers: Peers, device: torch.device) -> None:
    """One call of each kind that is not timed: no request waits until its kernel is compiled."""
    x = torch.zeros(1, peers.hidden, dtype=peers.dtype, device=device)
    for dtype in dict.fromkeys((peers.dtype, torch.float32)):  # of a norm's weight
        peers.sum_norm(x, x, torch.zeros(peers.hidden, dtype=dtype, device=device), 1e-6)
    peers.best(torch.zeros(1, device=device), torch.zeros(1, dtype=torch.int64, device=device))
