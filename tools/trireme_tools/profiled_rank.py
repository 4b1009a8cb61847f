"""A rank that can record which kernels its device ran in a window of steps: `python -m trireme_tools.profiled_rank BRIEF`.

It is the worker as it is but for its channel, which sees each step before the rank does and knows when it was launched. What to record
comes over stdin, a connection to the verb that started it (profiler.py):

    verb --list[Window]--> rank   rank --b""--> verb   (steps)   verb --list[Window], empty--> rank   rank --list[Recording]--> verb
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
import zmq

from trireme.core.control import open_message
from trireme.core.step import Step, array, peek_step
from trireme.ranks.channel import BREAK, Order, RankChannel
from trireme.ranks.worker import main, serve


class Window(msgspec.Struct, frozen=True):
    """Steps to record: of decodes alone, after `skip` such steps in a row, `steps` of them; or with steps 0 all that come."""

    skip: int = 0
    steps: int = 0


class Recording(msgspec.Struct, frozen=True):
    """Of a window. Times are nanoseconds of the device's clock."""

    first: int  # number of its first step
    rows: list[int]  # of each step
    marks: list[int]  # when the device began the first step, and was done with each
    names: list[str]  # of kernels; on a CPU of torch's ops that no other called
    which: bytes  # int32 [launches], numbers of names
    starts: bytes  # int64 [launches]
    ends: bytes  # int64 [launches]


class ProfiledChannel(RankChannel):
    """Orders are for one thread, which also launches steps: so it records them."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._verb = Connection(sys.stdin.fileno())
        self._asked = zmq.Poller()
        self._asked.register(self._orders, zmq.POLLIN)
        self._asked.register(self._verb.fileno(), zmq.POLLIN)
        self._windows: list[Window] = []  # not begun
        self._recordings: list[Recording] = []
        self._profile: _Profile | None = None  # of the first window
        self._decodes = 0  # in a row

    def receive(self) -> Order:
        self._launched()
        while not self._early and self._verb.fileno() in dict(self._asked.poll()):
            self._obey(msgspec.msgpack.decode(self._verb.recv_bytes(), type=list[Window]))
        order = super().receive()
        message = None if order.ticket == BREAK else open_message(order.parcel.packed)
        if isinstance(message, memoryview):
            self._comes(peek_step(bytes(message)))
        return order

    def _obey(self, windows: list[Window]) -> None:
        """Get ready for windows; without any, tell what was recorded."""
        if windows:
            _Profile().stop()  # what is loaded at its first use
            self._windows, self._recordings, self._decodes = windows, [], 0
            if not windows[0].skip:
                self._profile = _Profile()
            self._verb.send_bytes(b"")
            return
        self._finish()
        self._windows = []
        self._verb.send_bytes(msgspec.msgpack.encode(self._recordings))

    def _comes(self, step: Step) -> None:
        self._decodes = self._decodes + 1 if np.array_equal(array(step.samples), array(step.counts)) else 0
        if self._profile is None and self._windows and self._decodes > self._windows[0].skip:
            self._profile = _Profile()
        if self._profile is not None:
            self._profile.comes(step)

    def _launched(self) -> None:
        if self._profile is not None:
            self._profile.launched()
            if self._profile.rows and len(self._profile.rows) == self._windows[0].steps:
                self._finish()

    def _finish(self) -> None:
        """The window that is being recorded."""
        if self._profile is not None:
            self._recordings.append(self._profile.stop())
            self._profile, self._windows = None, self._windows[1:]


class _Profile:
    """What the device does from now on, with a mark before the first step and after each: a kernel that takes no time."""

    def __init__(self):
        import torch  # once the rank has: a worker beats before it waits for that

        self._torch, self._on_gpu = torch, torch.cuda.is_initialized()
        kinds = torch.profiler.ProfilerActivity
        self._profile = torch.profiler.profile(activities=[kinds.CUDA if self._on_gpu else kinds.CPU])
        with warnings.catch_warnings(action="ignore"):  # of cycles, of which this has one
            self._profile.start()
        self._first, self._under_way = -1, False
        self.rows: list[int] = []

    def comes(self, step: Step) -> None:
        if not self.rows:
            self._first = step.number
            self._mark()
        self.rows.append(step.num_rows)
        self._under_way = True

    def launched(self) -> None:
        if self._under_way:
            self._mark()
        self._under_way = False

    def stop(self) -> Recording:
        """Waits for the device."""
        self._profile.stop()
        found = self._profile.profiler
        assert found is not None and found.kineto_results is not None, "it was started"
        kind = self._torch.autograd.DeviceType.CUDA if self._on_gpu else self._torch.autograd.DeviceType.CPU
        events = [event for event in found.kineto_results.events() if event.device_type() == kind]
        marked = "spin_kernel" if self._on_gpu else _MARK
        marks = sorted(event.start_ns() for event in events if marked in event.name())
        events = [event for event in events if marked not in event.name() and not (self._on_gpu and event.is_user_annotation())]
        if not self._on_gpu:
            events = _uncalled(events)
        kernels = [(event.name(), event.start_ns(), event.start_ns() + event.duration_ns()) for event in events]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(name for name, _, _ in kernels))}
        which = np.array([numbers[name] for name, _, _ in kernels], np.int32)
        times = np.array([(start, end) for _, start, end in kernels], np.int64).reshape(-1, 2)
        return Recording(self._first, self.rows, marks, list(numbers), which.tobytes(), times[:, 0].tobytes(), times[:, 1].tobytes())

    def _mark(self) -> None:
        if self._on_gpu:
            self._torch.cuda._sleep(1)
        else:
            with self._torch.profiler.record_function(_MARK):
                pass


def _uncalled(events: Iterable[Any]) -> list[Any]:
    """Of a CPU's events those of ops that no other called, and of messages, which are under way beside ops."""
    reach, found = 0, []
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        if event.is_async() or event.start_ns() >= reach:
            found.append(event)
            reach = reach if event.is_async() else event.start_ns() + event.duration_ns()
    return found


_MARK = "trireme: a step's end"


if __name__ == "__main__":
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler says when it starts and stops
    main(serve, ProfiledChannel)
