"""Mail: rows of large steps put straight into another rank's memory by a GPU's copy engines, so that all of its multiprocessors go
on multiplying: NCCL's kernels take some of them, and wait for each other behind products that take all.

A layer of Qwen3-8B's shape, 8192 rows, two H100s: 2,837 us by mail, 2,988 by NCCL; in two strips 2,567 and 3,024; 2,192 with no
exchange at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch

from trireme.parallel.comm import LinkLost
from trireme.parallel.mapping import Exchange, map_others
from trireme.parallel.peer import PeerSum, meet_peers

_LEAST_ROWS = 256  # of fewer the host's launches are what takes time
_BELL = 16  # numbers of a sum that is made only to meet


class Bell(Protocol):
    """Of Peers, what mail asks for."""

    def sum(self, x: torch.Tensor) -> torch.Tensor: ...

    def give_up(self) -> None: ...


class _Box(NamedTuple):
    """A rank's memory for mail, a slot for each strip of a step, taken in turns."""

    shares: torch.Tensor  # [slots, W - 1, S, H]: others' shares of a sum, by place without this rank's
    rows: torch.Tensor  # [slots, W * S, H]: gathered rows


class Mailbox:
    """Memory of the rank at `place` of `size` for exchanges of strips of up to `num_rows` rows of `hidden` numbers, of which a step has
    up to `num_slots`. It stays through all epochs: torch would keep it all the same for any rank that was killed."""

    def __init__(
        self, place: int, size: int, num_rows: int, hidden: int, dtype: torch.dtype, device: torch.device | str, *, num_slots: int = 2
    ):
        self.place, self.size, self.share, self.hidden, self.num_slots = place, size, -(-num_rows // size), hidden, num_slots
        self.memory = torch.empty(num_slots * (2 * size - 1) * self.share * hidden, dtype=dtype, device=device)

    def box(self, memory: torch.Tensor) -> _Box:
        """This rank's memory, or another's."""
        slots, size, share, hidden = self.num_slots, self.size, self.share, self.hidden
        shares, rows = memory.split([slots * num * share * hidden for num in (size - 1, size)])
        return _Box(shares.view(slots, size - 1, share, hidden), rows.view(slots, size * share, hidden))

    def meet(self, peer_sum: PeerSum, words: torch.cuda.Stream, exchange: Exchange) -> Mail | str:
        """With the others along the group, in an epoch; blocks until all are here. Or, on all of them, why they cannot mail. `words`:
        see Collectives.words."""
        device, dtype = self.memory.device, self.memory.dtype
        with torch.cuda.device(device):  # a thread has a device of its own
            others = map_others(self.memory, self.place, self.size, device, lambda name, said: exchange(f"mail {name}", said))
            if isinstance(others, str):
                return others
            bell = meet_peers(
                self.place,
                self.size,
                device,
                hidden=_BELL,
                dtype=dtype,
                op=peer_sum,
                words=words,
                exchange=lambda name, said: exchange(f"bell {name}", said),
            )
            return bell if isinstance(bell, str) else Mail(self, others, bell)


class Mail:
    """reduce_scatter and all_gather of a Group, in one epoch. Without others it speaks to nobody, and only shapes are right.

    Each call ends when all ranks have written their part. Gathered rows stay in this memory until the slot's next all_gather, or until
    a reduce_scatter just before that: others write when they have met this rank there. Shares are summed inside of the call, so
    that a call after it tells that they were; where sums of one slot follow each other, ranks meet once more.
    """

    def __init__(self, mailbox: Mailbox, others: Mapping[int, torch.Tensor] = MappingProxyType({}), bell: Bell | None = None):
        self._mailbox, self._own = mailbox, mailbox.box(mailbox.memory)
        self._others = {other: mailbox.box(memory) for other, memory in others.items()}
        self._bell, self._nothing = bell, mailbox.memory.new_zeros(_BELL)
        self._sums = self._gathers = 0  # calls
        self._summed = False  # whether the last call was a sum

    def greet(self, wait: Callable[[], None]) -> None:
        """Meet the others, as every one of them does, before the first step, which would else wait until the bell's kernel is compiled.
        `wait`: until the device has come so far; LinkLost where it does not, and it waits no longer then."""
        try:
            self._meet()
            wait()
        except LinkLost:
            self.give_up()
            raise

    def takes(self, x: torch.Tensor, counts: Sequence[int]) -> bool:
        """Whether rows of these counts go by mail: the same on all ranks. Not in a graph, where slots would not be taken in turns."""
        mailbox = self._mailbox
        if x.dtype != mailbox.memory.dtype or x.shape[1:] != (mailbox.hidden,):
            return False
        return max(counts) <= mailbox.share and sum(counts) >= _LEAST_ROWS and not (x.is_cuda and torch.cuda.is_current_stream_capturing())

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        place, slot, shares = self._mailbox.place, self._sums % self._mailbox.num_slots, x.split(counts)
        if self._summed and self._mailbox.num_slots == 1:
            self._meet()
        for other, box in self._others.items():
            box.shares[slot, place - (place > other), : counts[other]].copy_(shares[other])
        self._meet()
        parts = list(self._own.shares[slot, :, : counts[place]])
        parts.insert(place, shares[place])
        self._sums, self._summed = self._sums + 1, True
        if len(parts) == 2:
            return parts[0] + parts[1]
        return torch.stack(parts).sum(0, dtype=torch.float32).to(x.dtype)

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        if not self._summed:
            self._meet()
        slot, first = self._gathers % self._mailbox.num_slots, sum(counts[: self._mailbox.place])
        for box in (*self._others.values(), self._own):
            box.rows[slot, first : first + len(x)].copy_(x)
        self._meet()
        self._gathers, self._summed = self._gathers + 1, False
        return self._own.rows[slot, : sum(counts)]

    def give_up(self) -> None:
        """As Peers: nobody is waited for any longer."""
        if self._bell is not None:
            self._bell.give_up()

    def _meet(self) -> None:
        """What others put into this rank's memory before they came here is there for all that this stream does from here on."""
        if self._bell is not None:
            self._bell.sum(self._nothing)
