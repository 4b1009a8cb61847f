"""Channel: the words and sockets between a leader and one rank, ZMQ over ipc in the run folder. No decisions are made here.

Each life of a rank has two sockets of its own, so nothing of a dead rank is ever mistaken for news of its successor:

    leader PUSH --orders--> rank PULL        leader PULL <--answers and beats-- rank PUSH

Both files are unlinked as soon as the rank is connected: a leader that is killed leaves no socket behind.
"""

from __future__ import annotations

import contextlib
import struct
import threading
from collections import deque
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import zmq

from trireme.core.control import Parcel
from trireme.core.refusal import Refusal

BREAK = 0  # the ticket of an order that drops the epoch and is not answered; other orders count from 1
_BEAT = 0  # the ticket of a beat among answers
_MAX_PATH = 107  # bytes of a Unix socket's path
_ORDER = struct.Struct("<q")  # ticket
_ANSWER = struct.Struct("<IIq?")  # rank, life, ticket, whether the answer is a Fault


class Beat(msgspec.Struct, frozen=True):
    """A rank's sign of life. `state`: "starting" | "loading" | "ready" | "failed"."""

    state: str
    detail: str = ""
    num_pages: int = 0
    num_snapshots: int | None = None  # see StageState
    activation_bytes: int = 0  # see StageState


class Order(NamedTuple):
    """What a rank is to do; it answers with the same ticket."""

    ticket: int
    parcel: Parcel


class Answer(NamedTuple):
    """What a leader hears: a beat, or a parcel for a ticket."""

    rank: int
    life: int
    ticket: int
    fault: bool
    parcel: Parcel
    beat: Beat | None


def socket_paths(run_dir: Path, stage: int, rank: int, life: int) -> tuple[Path, Path]:
    """Where orders go and answers come in one life of a rank."""
    orders, answers = (run_dir / f"s{stage}r{rank}.{life}.{way}" for way in ("in", "out"))
    if len(str(answers)) > _MAX_PATH:
        raise Refusal(
            f"run folder {run_dir} is too long for local sockets",
            why=f"a socket's path has at most {_MAX_PATH} bytes",
            fix="use a shorter folder, such as one below /tmp",
        )
    return orders, answers


class OrderSocket:
    """The leader's end towards one life of a rank. Not thread-safe: the leader's lock guards it."""

    def __init__(self, context: zmq.Context, orders: Path, answers: Path):
        self._files = [orders, answers]
        self._socket = _socket(context, zmq.PUSH)
        self._socket.bind(f"ipc://{orders}")

    def hide(self) -> None:
        """Remove the socket files once the rank is connected, which its first beat proves for one and POLLOUT for the other."""
        if self._files and self._socket.poll(0, zmq.POLLOUT):
            self._unlink()

    def send(self, ticket: int, parcel: Parcel) -> bool:
        """Whether the order went out; False where no rank is connected."""
        try:
            self._socket.send_multipart(_frames(_ORDER.pack(ticket), parcel), flags=zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close()
        self._unlink()

    def _unlink(self) -> None:
        for file in self._files:
            file.unlink(missing_ok=True)
        self._files = []


class AnswerSocket:
    """The leader's ear for all its ranks. Owned by the leader's thread."""

    def __init__(self, context: zmq.Context):
        self._socket = _socket(context, zmq.PULL)

    def listen(self, answers: Path) -> None:
        self._socket.bind(f"ipc://{answers}")

    def forget(self, answers: Path) -> None:
        with contextlib.suppress(zmq.ZMQError):  # the library's own unlink of a file that `hide` has removed
            self._socket.unbind(f"ipc://{answers}")

    def receive(self, timeout_s: float) -> Answer | None:
        """The next answer or beat, or None after `timeout_s` seconds."""
        if not self._socket.poll(round(timeout_s * 1000)):
            return None
        head, packed, *rows = self._socket.recv_multipart()
        rank, life, ticket, fault = _ANSWER.unpack(head)
        if ticket == _BEAT:
            return Answer(rank, life, ticket, fault, Parcel(b""), msgspec.msgpack.decode(packed, type=Beat))
        return Answer(rank, life, ticket, fault, _parcel(packed, rows), None)

    def close(self) -> None:
        self._socket.close()


class Left(Exception):
    """This life of the rank is over: no orders will come."""


class RankChannel:
    """A rank's end. Orders are for one thread; `answer` and `beat` may come from several.

    `leave`: a file descriptor that becomes readable when the rank is to leave; without one it never is.
    """

    def __init__(self, run_dir: Path, stage: int, rank: int, life: int, leave: int | None = None):
        orders, answers = socket_paths(run_dir, stage, rank, life)
        self._rank, self._life, self._leave = rank, life, leave
        self.lives_once = leave is None  # its process ends with this life
        self._context = zmq.Context()
        self._orders, self._answers = _socket(self._context, zmq.PULL), _socket(self._context, zmq.PUSH)
        self._orders.connect(f"ipc://{orders}")
        self._answers.connect(f"ipc://{answers}")
        self._lock = threading.Lock()
        self._early: deque[Order] = deque()  # came while `broken` looked
        self._news = zmq.Poller()
        self._news.register(self._orders, zmq.POLLIN)
        if leave is not None:
            self._news.register(leave, zmq.POLLIN)

    def receive(self) -> Order:
        """The next order, however long it takes: a rank whose leader is gone is ended by the kernel. Left when it is to leave."""
        if self._early:
            return self._early.popleft()
        if self._leave in dict(self._news.poll()):
            raise Left
        return self._take()

    def _take(self) -> Order:
        head, packed, *rows = self._orders.recv_multipart()
        return Order(_ORDER.unpack(head)[0], _parcel(packed, rows))

    def waiting(self) -> bool:
        """Whether `receive` would return, or raise, at once."""
        return bool(self._early or self._news.poll(0))

    def broken(self) -> bool:
        """Whether the epoch is dropped, or the rank is to leave, behind orders that wait to be received."""
        while news := dict(self._news.poll(0)):
            if self._leave in news:
                return True
            self._early.append(self._take())
        return any(order.ticket == BREAK for order in self._early)

    def answer(self, ticket: int, parcel: Parcel, *, fault: bool) -> None:
        with self._lock:
            self._answers.send_multipart(_frames(_ANSWER.pack(self._rank, self._life, ticket, fault), parcel))

    def beat(self, beat: Beat) -> None:
        with self._lock:
            self._answers.send_multipart([_ANSWER.pack(self._rank, self._life, _BEAT, False), msgspec.msgpack.encode(beat)])

    def close(self) -> None:
        """Once no other thread uses it."""
        self._orders.close()
        self._answers.close()
        self._context.term()


def _socket(context: zmq.Context, kind: int) -> zmq.Socket:
    socket = context.socket(kind)
    socket.set_hwm(0)  # steps in flight bound what waits here
    socket.linger = 0
    return socket


def _frames(head: bytes, parcel: Parcel) -> list[bytes | memoryview]:
    return [head, parcel.packed] if parcel.rows is None else [head, parcel.packed, parcel.rows.data]


def _parcel(packed: bytes, rows: list[bytes]) -> Parcel:
    return Parcel(packed, np.frombuffer(rows[0], dtype=np.uint8) if rows else None)
