"""Profiler: has the ranks that it starts record windows of steps, and shows what those were made of, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from trireme.core.refusal import Refusal
from trireme.ranks.launch import Brief, LocalProcess, RankProcess
from trireme_tools import kernel_time
from trireme_tools.kernel_time import Kernels, look_at
from trireme_tools.profiled_rank import Recording, Window

_LEAD = 3  # steps of a window that are not looked at: the device had nothing to do while its profiler was started
_MOST_STEPS = 16  # of a window that are
_PATIENCE_S = 60.0  # for a rank's profiler


class Profile(NamedTuple):
    """One window in one rank."""

    what: str
    stage: int
    rank: int
    first: int  # number of its first step
    last: int
    rows: list[int]  # of each step that was looked at
    window: kernel_time.Window


def decodes(output_len: int, where: float = 0.5) -> Window:
    """A window of a run in which every sequence decodes `output_len` tokens: the part `where` of its steps is before the middle."""
    steps = max(1, min(_MOST_STEPS, output_len // 4))
    return Window(skip=max(1, round(where * output_len) - _LEAD - steps // 2), steps=_LEAD + steps)


PREFILL = Window()  # all steps of a run


class Profiler:
    """A Launcher. Ranks are asked only while nothing is submitted, so that all of them record the same steps."""

    def __init__(self):
        self.profiles: list[Profile] = []
        self._ranks: dict[tuple[int, int], Connection] = {}

    def launch(self, brief: Brief) -> RankProcess:
        self._ranks[brief.stage, brief.rank], stdin = Pipe()
        with stdin:
            threads = brief.settings.threads(brief.settings.world)
            argument = msgspec.json.encode(brief).decode()
            return LocalProcess("trireme_tools.profiled_rank", argument, threads=threads, stdin=stdin.fileno())

    @contextmanager
    def recording(self, windows: Mapping[str, Window]) -> Iterator[None]:
        """Around a run: those windows of it, in their order, by what they are called in `profiles`. Refusal where a rank is silent or
        has ended."""
        for connection in self._ranks.values():
            self._tell(connection, list(windows.values()))
        for connection in self._ranks.values():
            self._hear(connection)
        yield
        for connection in self._ranks.values():
            self._tell(connection, [])
        for (stage, rank), connection in sorted(self._ranks.items()):
            recordings = msgspec.msgpack.decode(self._hear(connection), type=list[Recording])
            for (what, window), recording in zip(windows.items(), recordings, strict=False):
                lead = _LEAD if window.skip else 0
                if len(recording.rows) > lead:
                    self.profiles.append(_profile(what, stage, rank, recording, lead))

    def _tell(self, connection: Connection, windows: list[Window]) -> None:
        try:
            connection.send_bytes(msgspec.msgpack.encode(windows))
        except OSError:
            raise _ended() from None

    def _hear(self, connection: Connection) -> bytes:
        if not connection.poll(_PATIENCE_S):
            raise Refusal("a rank's profiler does not answer", why=f"it was silent for {_PATIENCE_S:g} s", kind="internal")
        try:
            return connection.recv_bytes()
        except (EOFError, OSError):
            raise _ended() from None


def _ended() -> Refusal:
    return Refusal("a rank ended while it was profiled", why="its own words are above", kind="internal")


def _profile(what: str, stage: int, rank: int, recording: Recording, lead: int) -> Profile:
    kernels = Kernels(
        recording.names,
        np.frombuffer(recording.which, np.int32),
        np.frombuffer(recording.starts, np.int64),
        np.frombuffer(recording.ends, np.int64),
    )
    window = look_at(kernels, recording.marks[lead:])
    last = recording.first + len(recording.rows) - 1
    return Profile(what, stage, rank, recording.first, last, recording.rows[lead:], window)


def show(console: Console, profiles: Sequence[Profile]) -> None:
    """A table for each window, stage and rank."""
    for each in profiles:
        window, rows = each.window, f"{min(each.rows)}-{max(each.rows)}" if len({*each.rows}) > 1 else f"{each.rows[0]}"
        title = f"{each.what}, stage {each.stage} rank {each.rank}: {window.steps} steps of {rows} rows, {window.step_ms:.3f} ms each"
        table = Table("kernels", "share of the step", "ms", "ms from start to end", "launches", title=title)
        for group in window.groups:
            share = f"{group.ms / window.step_ms:.1%}"
            table.add_row(group.name, share, f"{group.ms:.3f}", f"{group.sum_ms:.3f}", f"{group.launches:.1f}")
        table.add_row("none: idle", f"{window.idle_ms / window.step_ms:.1%}", f"{window.idle_ms:.3f}", "", "")
        console.print(table)


def as_json(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """With every kernel by its full name."""
    return [
        {
            **{name: value for name, value in each._asdict().items() if name != "window"},
            **{name: getattr(each.window, name) for name in ("steps", "step_ms", "idle_ms")},
            "groups": [group._asdict() for group in each.window.groups],
            "kernels": [kernel._asdict() for kernel in each.window.kernels],
        }
        for each in profiles
    ]
