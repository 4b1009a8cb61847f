"""Comm: groups of ranks made alone, each from its own prefix of an epoch's store. No default world, so no stage ties another.

Facts of gloo that this file is built on (measured, torch 2.13): `send` returns before the bytes are gone, so tensor and
work are kept; a work says it is complete only after a wait; a blocked receive is freed by the peer's death, or by the
peer dropping its last reference to the group and to every work of it.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # not in __all__

_HOST = "127.0.0.1"  # stages of one server share a host
_GLANCE_S = 0.002  # between looks for the others at a meeting


class LinkLost(RuntimeError):
    """Another rank is gone, late, or speaks of something else. The epoch is over."""


class StoreHost:
    """A rendezvous store in this process, on a free port, for as long as this value lives."""

    def __init__(self, timeout_s: float):
        self._store = TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        self.address = f"{_HOST}:{self._store.port}"


def reach_store(address: str, timeout_s: float) -> TCPStore:
    """Another process's store, by host:port."""
    host, port = address.rsplit(":", 1)
    with _lost_as(f"store {address}"):
        return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))


def meet(store: TCPStore, epoch: int, seat: int, num_seats: int, timeout_s: float, give_up: Callable[[], bool]) -> None:
    """Wait until every seat is taken, so that forming groups cannot block on one that never comes. LinkLost when time is
    over or `give_up` says so."""
    seats = [f"{epoch}/seat/{other}" for other in range(num_seats)]
    deadline = time.monotonic() + timeout_s
    with _lost_as(f"the meeting of epoch {epoch}"):
        store.set(seats[seat], "taken")
        while not store.check(seats):
            if give_up():
                raise LinkLost(f"epoch {epoch} was given up before all ranks came")
            if time.monotonic() > deadline:
                missing = [other for other, name in enumerate(seats) if not store.check([name])]
                raise LinkLost(f"epoch {epoch}: ranks {missing} did not come within {timeout_s:g} s")
            time.sleep(_GLANCE_S)


class Group(Protocol):
    """Ranks of one epoch that call the same collectives in the same order, each with its place among them. LinkLost where one
    of them is gone or late."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor: ...

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor: ...

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor: ...


class GlooGroup:
    """A Group on CPUs. Sums are made in float32 and in the order of places, whoever keeps them, so that no rank's result
    depends on which rank made it."""

    def __init__(self, store: TCPStore, epoch: int, name: str, place: int, size: int, timeout_s: float):
        self.name = f"{name} of epoch {epoch}"
        self.size, self.place = size, place
        self._group = _form(store, epoch, name, place, size, timeout_s)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        summed = x.to(torch.float32).contiguous()
        with _lost_as(self.name):
            self._group.allreduce([summed]).wait()
        return summed.to(x.dtype)

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        most, rest = max(counts), x.shape[1:]
        mine = x.new_zeros(most, *rest)  # gloo gathers equal parts
        mine[: len(x)] = x
        every = x.new_empty(self.size * most, *rest)
        with _lost_as(self.name):
            self._group._allgather_base(every, mine).wait()
        if min(counts) == most:
            return every
        return torch.cat([part[:count] for part, count in zip(every.split(most), counts, strict=True)])

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        mine = counts[self.place]
        shares = self.all_to_all(x, counts, [mine] * self.size).view(self.size, mine, *x.shape[1:])
        return shares.sum(0, dtype=torch.float32).to(x.dtype)

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        came = x.new_empty(sum(received), *x.shape[1:])
        with _lost_as(self.name):
            self._group.alltoall_base(came, x.contiguous(), received, sent).wait()
        return came


class Expected:
    """A tensor on its way here."""

    def __init__(self, pair: Pair, work: torch.distributed.Work, tensor: torch.Tensor):
        self._pair, self._work, self._tensor = pair, work, tensor

    def wait(self) -> torch.Tensor:
        with _lost_as(self._pair.name):
            self._work.wait()
        return self._tensor


class Pair:
    """A gloo group of two. Messages keep their order. `depth`: a send is surely received once so many more were sent."""

    def __init__(self, store: TCPStore, epoch: int, name: str, side: int, timeout_s: float, depth: int):
        self.name = f"{name} of epoch {epoch}"
        self._group = _form(store, epoch, name, side, 2, timeout_s)
        self._peer = 1 - side
        self._sent: deque[tuple[torch.distributed.Work, torch.Tensor]] = deque()
        self._depth = depth

    def send(self, tensor: torch.Tensor) -> None:
        """Returns at once; the tensor must not change afterwards."""
        tensor = tensor.contiguous()
        with _lost_as(self.name):
            work = self._group.send([tensor], self._peer, 0)
            self._sent.append((work, tensor))
            if len(self._sent) > self._depth:
                work, _ = self._sent.popleft()
                work.wait()

    def expect(self, *shape: int, dtype: torch.dtype) -> Expected:
        """The next message, which must have this shape; returns at once."""
        tensor = torch.empty(*shape, dtype=dtype)
        with _lost_as(self.name):
            work = self._group.recv([tensor], self._peer, 0)
        return Expected(self, work, tensor)


def _form(store: TCPStore, epoch: int, name: str, place: int, size: int, timeout_s: float) -> Any:
    """A ProcessGroupGloo, of which torch's stubs know little. Blocks until all members are here."""
    options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stubs
    options._devices = [ProcessGroupGloo.create_device(hostname=_HOST)]
    options._timeout = timedelta(seconds=timeout_s)
    options._threads = 1
    with _lost_as(f"{name} of epoch {epoch}"):
        return ProcessGroupGloo(PrefixStore(f"{epoch}/{name}", store), place, size, options)


@contextlib.contextmanager
def _lost_as(name: str) -> Iterator[None]:
    """torch's errors of a broken connection as LinkLost."""
    try:
        yield
    except LinkLost:
        raise
    except RuntimeError as error:  # DistError and its kin are RuntimeErrors
        raise LinkLost(f"{name}: {_gist(error)}") from None


def _gist(error: RuntimeError) -> str:
    """What happened, without where in gloo's source and what its authors advise."""
    line = str(error).splitlines()[0]
    return re.sub(r"^\[\S+\.(cc|h|cpp):\d+\] ", "", line).split(". This is typically")[0]
