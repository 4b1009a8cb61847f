"""Comm: groups of ranks made alone, each from its own prefix of an epoch's store. No default world, so no stage ties another.

Facts of gloo that this file is built on (measured, torch 2.13): `send` returns before the bytes are gone, so tensor and
work are kept; a work says it is complete only after a wait; a blocked receive is freed by the peer's death, or by the
peer dropping its last reference to the group and to every work of it; of a send that finds the peer just dead it forgets to
say so (about one kill in 50, and so in its source: `tx_` in tcp/pair.cc), and that is freed by the time limit alone.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

import torch
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, AllToAllOptions, ReduceScatterOptions
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # pyright: ignore[reportPrivateImportUsage]  # not in __all__

_HOST = "127.0.0.1"  # stages of one server share a host
_GLANCE_S = 0.002  # between looks for the others at a meeting

Made = TypeVar("Made")


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


def make_unless(give_up: Callable[[], bool], make: Callable[[Callable[[], bool]], Made]) -> Made:
    """What `make` makes of groups or stores. It blocks in torch until the others are here, for the whole time limit if one of
    them has died meanwhile, and nothing can interrupt it: hence in a thread of its own. When `give_up` says so that thread is
    left behind, LinkLost; what it still makes is dropped. `give_up` is asked by the caller's thread alone, `make` is given what
    its own may ask."""
    made: SimpleQueue[Made | Exception] = SimpleQueue()
    given_up = threading.Event()

    def run() -> None:
        try:
            made.put(make(given_up.is_set))
        except Exception as error:
            made.put(error)

    threading.Thread(target=run, name="make", daemon=True).start()
    while True:
        with contextlib.suppress(Empty):
            found = made.get(timeout=_GLANCE_S)
            break
        if give_up():
            given_up.set()
            raise LinkLost("given up before all ranks came")
    if isinstance(found, Exception):
        try:
            raise found
        finally:
            del found  # it knows this frame, and frames that hold groups: in a cycle they would live on
    return found


def exchange(store: TCPStore, epoch: int, name: str, place: int, size: int, said: bytes) -> list[bytes]:
    """What every place of a group says under a name, by place. Blocks until all have said it."""
    with _lost_as(f"{name} of epoch {epoch}"):
        store.set(f"{epoch}/{name}/{place}", said)  # pyright: ignore[reportArgumentType]  # bytes are taken as well
        return [store.get(f"{epoch}/{name}/{other}") for other in range(size)]


def reach(event: torch.cuda.Event, limit_s: float, give_up: Callable[[], bool], glance_s: float = _GLANCE_S / 10) -> None:
    """Wait until a device has come to an event behind a collective, which it never does if others of the group do not come.
    LinkLost when time is over or `give_up` says so; the group is then to be closed."""
    deadline = time.monotonic() + limit_s
    while not event.query():
        if give_up() or time.monotonic() > deadline:
            raise LinkLost("given up before all ranks came" if give_up() else f"not all ranks came within {limit_s:g} s")
        time.sleep(glance_s)


def wait_for_device(device: torch.device, limit_s: float, give_up: Callable[[], bool]) -> None:
    """Until it has done all that its current stream has, as `reach` waits: a synchronize nobody could end."""
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    reach(done, limit_s, give_up)


class Group(Protocol):
    """Ranks of one epoch that call the same collectives in the same order, each with its place among them. LinkLost where one
    of them is gone or late."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor: ...

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor: ...

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor: ...

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor: ...

    def close(self) -> None:
        """Its end; members that wait in it are freed."""
        ...


def form_group(
    store: TCPStore,
    epoch: int,
    name: str,
    place: int,
    size: int,
    timeout_s: float,
    device: torch.device,
    give_up: Callable[[], bool] = lambda: False,
) -> GlooGroup | NcclGroup:
    """Blocks until all members are here."""
    kind = GlooGroup if device.type == "cpu" else NcclGroup
    group = kind(_form(store, epoch, name, place, size, timeout_s, device), f"{name} of epoch {epoch}", place, size)
    if isinstance(group, NcclGroup):
        group.connect(timeout_s, device, give_up)
    return group


class GlooGroup:
    """A Group on CPUs. Sums are made in float32, and those that are dealt out in the order of places, whoever keeps them, so
    that no rank's result depends on which rank made it."""

    def __init__(self, group: Any, name: str, place: int, size: int):
        self._group: Any = group
        self._name, self._place, self._size = name, place, size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        summed = x.to(torch.float32).contiguous()
        with _lost_as(self._name):
            self._group.allreduce([summed]).wait()
        return summed.to(x.dtype)

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        most = max(counts)
        every = x.new_empty(self._size * most, *x.shape[1:])
        with _lost_as(self._name):
            self._group._allgather_base(every, _padded(x, most)).wait()
        return _without_padding(every, counts)

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        mine = counts[self._place]
        shares = self.all_to_all(x, counts, [mine] * self._size).view(self._size, mine, *x.shape[1:])
        return shares.sum(0, dtype=torch.float32).to(x.dtype)

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        came = x.new_empty(sum(received), *x.shape[1:])
        group = self._group  # kept while it waits: `close` by another thread would wait, too, for the group's own thread
        if group is None:
            raise LinkLost(f"{self._name}: it was closed")
        with _lost_as(self._name):
            group.alltoall_base(came, x.contiguous(), received, sent).wait()
        return came

    def close(self) -> None:
        self._group = None


class NcclGroup:
    """A Group on GPUs. Collectives are put on the current stream, and so can be captured; nothing here waits for them."""

    def __init__(self, group: Any, name: str, place: int, size: int):
        self._group: Any = group
        self._name, self._place, self._size = name, place, size

    def connect(self, timeout_s: float, device: torch.device, give_up: Callable[[], bool]) -> None:
        """Each collective once: NCCL connects ranks when it first needs to, and allocates then, which is not to happen while a
        collective of another group waits on the device."""
        x, ones = torch.zeros(self._size, device=device), [1] * self._size
        with _closed_if_lost(self):
            self.all_reduce(x)
            self.all_gather(x[:1], ones)
            self.reduce_scatter(x, ones)
            self.all_to_all(x, ones, ones)
            wait_for_device(device, timeout_s, give_up)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        with _lost_as(self._name):
            self._group.allreduce([x], _on_this_stream(AllreduceOptions()))
        return x

    def all_gather(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        most = max(counts)
        every = x.new_empty(self._size * most, *x.shape[1:])
        with _lost_as(self._name):
            self._group._allgather_base(every, _padded(x, most), _on_this_stream(AllgatherOptions()))
        return _without_padding(every, counts)

    def reduce_scatter(self, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
        most, mine = max(counts), counts[self._place]
        if min(counts) < most:
            x = torch.cat([_padded(part, most) for part in x.split(counts)])
        share = x.new_empty(most, *x.shape[1:])
        with _lost_as(self._name):
            self._group._reduce_scatter_base(share, x.contiguous(), _on_this_stream(ReduceScatterOptions()))
        return share[:mine]

    def all_to_all(self, x: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        came = x.new_empty(sum(received), *x.shape[1:])
        with _lost_as(self._name):
            self._group.alltoall_base(came, x.contiguous(), received, sent, _on_this_stream(AllToAllOptions()))
        return came

    def close(self) -> None:
        self._group.abort()


def _on_this_stream(options: Any) -> Any:
    options.asyncOp = False
    return options


def _padded(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """x with rows of zeros behind it: both backends gather and deal out equal parts."""
    if len(x) == num_rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(num_rows - len(x), *x.shape[1:])])


def _without_padding(every: torch.Tensor, counts: list[int]) -> torch.Tensor:
    most = max(counts)
    if min(counts) == most:
        return every
    return torch.cat([part[:count] for part, count in zip(every.split(most), counts, strict=True)])


class Expected:
    """A tensor on its way here."""

    def __init__(self, name: str, receive: Callable[[], torch.distributed.Work], tensor: torch.Tensor):
        self._name, self._receive, self._tensor = name, receive, tensor

    def wait(self) -> torch.Tensor:
        with _lost_as(self._name):
            self._receive().wait()
        return self._tensor


class Pair:
    """A group of two in which side 0 sends rows to side 1. Messages keep their order. `depth`: a send is surely received once so many
    more were sent. On a GPU each pair has a communicator and a stream of its own, so that sends overlap what is computed."""

    def __init__(
        self,
        store: TCPStore,
        epoch: int,
        name: str,
        side: int,
        timeout_s: float,
        depth: int,
        device: torch.device,
        give_up: Callable[[], bool] = lambda: False,
    ):
        self.name = f"{name} of epoch {epoch}"
        self._group: Any = _form(store, epoch, name, side, 2, timeout_s, device)
        self._peer = 1 - side
        self._sent: deque[tuple[torch.distributed.Work, torch.Tensor]] = deque()
        self._depth, self._device = depth, device
        if device.type != "cpu":
            self._connect(timeout_s, give_up)

    def _connect(self, timeout_s: float, give_up: Callable[[], bool]) -> None:
        """NCCL connects two ranks at their first message, and neither's process goes on before the other has its end of it: two
        stages that each began with another pair would wait for each other."""
        greeting = torch.zeros(1, device=self._device)
        with _closed_if_lost(self), _lost_as(self.name):
            pass_on = self._group.recv if self._peer == 0 else self._group.send
            pass_on([greeting], self._peer, 0).wait()
            wait_for_device(self._device, timeout_s, give_up)

    def send(self, tensor: torch.Tensor) -> None:
        """Returns at once; the tensor must not change afterwards."""
        tensor = tensor.to(self._device).contiguous()
        with _lost_as(self.name):
            work = self._group.send([tensor], self._peer, 0)
            self._sent.append((work, tensor))
            if len(self._sent) > self._depth:
                work, _ = self._sent.popleft()
                work.wait()

    def expect(self, *shape: int, dtype: torch.dtype) -> Expected:
        """The next message, which must have this shape; returns at once. Messages are waited for in their order.

        gloo begins to receive here. On a GPU that is a kernel that waits for the other side, so it is launched by `wait`: launched
        before the rows that the other side needs to answer, it could hold them up.
        """
        tensor = torch.empty(*shape, dtype=dtype, device=self._device)

        def receive() -> torch.distributed.Work:
            return self._group.recv([tensor], self._peer, 0)

        if self._device.type != "cpu":
            return Expected(self.name, receive, tensor)
        with _lost_as(self.name):
            work = receive()
        return Expected(self.name, lambda: work, tensor)

    def close(self) -> None:
        """Both ends are freed. gloo's ends with the last reference to it and to what is under way; NCCL's has to be told."""
        if self._device.type != "cpu":
            self._group.abort()
        self._group = None
        self._sent.clear()


@contextlib.contextmanager
def _closed_if_lost(ends: NcclGroup | Pair) -> Iterator[None]:
    """What is being formed is nobody's yet: what it has put on the device would wait there for ever, and all that comes after it."""
    try:
        yield
    except LinkLost:
        ends.close()
        raise


def _form(store: TCPStore, epoch: int, name: str, place: int, size: int, timeout_s: float, device: torch.device) -> Any:
    """A ProcessGroup of torch, of which its stubs know little. Blocks until all members are here."""
    meeting = PrefixStore(f"{epoch}/{name}", store)
    with _lost_as(f"{name} of epoch {epoch}"):
        if device.type == "cpu":
            options = ProcessGroupGloo._Options()  # pyright: ignore[reportAttributeAccessIssue]  # not in torch's stubs
            options._devices = [ProcessGroupGloo.create_device(hostname=_HOST)]
            options._timeout = timedelta(seconds=timeout_s)
            options._threads = 1
            return ProcessGroupGloo(meeting, place, size, options)
        from torch.distributed import ProcessGroupNCCL  # pyright: ignore[reportPrivateImportUsage]  # a CPU build has none

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        group = ProcessGroupNCCL(meeting, place, size, options)
        group.eager_connect_single_device(device)
        return group


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
