"""Worker: the process of one rank, tied to its leader, beating, then on duty. torch is imported only after the first two.

`python -m trireme.ranks.worker BRIEF` lives once. `python -m trireme.ranks.worker --pool LEADER` lives as one rank after another:
importing torch costs more than a small model does. Its stdin is a connection to the pool:

    pool --brief--> worker   pool --leave--> worker   worker --left--> pool   pool --brief--> worker   ...
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import numpy as np

from trireme.core.garbage import settle
from trireme.core.refusal import Refusal
from trireme.ranks.channel import Beat, Left, RankChannel
from trireme.ranks.launch import Brief

_BEAT_S = 0.5
# A thread that lays experts ready makes thousands of small calls; one that launches steps waits this long for its turn after each of
# its own that let go of the interpreter's lock (5 ms by default: a step of 17 ms took 85 on an H100).
_TURN_S = 0.0002
_PR_SET_PDEATHSIG = 1


class Heart:
    """Beats from a thread of its own, so that a rank that computes is not taken for a mute one."""

    def __init__(self, channel: RankChannel):
        self._channel, self._beat = channel, Beat("starting")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._thread.start()

    def tell(self, beat: Beat) -> None:
        """Beat this from now on; the first time at once."""
        self._beat = beat
        self._channel.beat(beat)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        self._channel.beat(self._beat)
        while not self._stop.wait(_BEAT_S):
            self._channel.beat(self._beat)


Serve = Callable[[Brief, RankChannel, Heart], None]  # what a rank does in one life, until Left


def tie_to(leader: int) -> None:
    """Die with the leader's thread, however it ends; at once if that has happened already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leader:
        sys.exit("the leader is gone")


def serve(brief: Brief, channel: RankChannel, heart: Heart) -> None:
    """Load, then do the duty."""
    from trireme.ranks.duty import Duty  # seconds: torch
    from trireme.ranks.load import load_runner

    sys.setswitchinterval(_TURN_S)
    heart.tell(Beat("loading", "is loading"))
    maps = {layer: np.frombuffer(map, np.int16).astype(np.int32) for layer, map in brief.maps.items()}

    def progress(sentence: str) -> None:
        heart.tell(Beat("loading", sentence))

    try:
        runner = load_runner(brief.settings, brief.stage, brief.rank, progress, maps, brief.map_version)
    except Refusal as refusal:
        heart.tell(Beat("failed", str(refusal)))
        while True:
            channel.receive()  # until the leader has heard it and ends this rank
    if channel.lives_once:  # else the pool's process would keep what this life leaves behind
        settle()
    heart.tell(Beat("ready", "", runner.num_pages, runner.num_snapshots, runner.room.activations + runner.room.mailbox))
    Duty(brief, channel, runner).do()


def main(serve: Serve, channel: type[RankChannel] = RankChannel) -> None:
    """`channel`: what a rank hears and answers over."""
    if sys.argv[1] == "--pool":
        tie_to(int(sys.argv[2]))
        _live_on(serve, channel, Connection(sys.stdin.fileno()))
    else:
        brief = msgspec.json.decode(sys.argv[1], type=Brief)
        tie_to(brief.leader)
        _live(serve, channel, brief)


def _live_on(serve: Serve, channel: type[RankChannel], pool: Connection) -> None:
    """Life after life, until the pool is closed. A life that ends in an exception ends the process, as it would without a pool."""
    with contextlib.suppress(EOFError):
        while True:
            _live(serve, channel, msgspec.json.decode(pool.recv_bytes(), type=Brief), leave=pool.fileno())
            settle()  # groups and caches in cycles go; the rest is torch's and ours for ever
            pool.recv_bytes()
            pool.send_bytes(b"left")


def _live(serve: Serve, channel: type[RankChannel], brief: Brief, leave: int | None = None) -> None:
    """One life; nothing of it stays."""
    opened = channel(Path(brief.run_dir), brief.stage, brief.rank, brief.life, leave)
    heart = Heart(opened)
    try:
        serve(brief, opened, heart)
    except Left:
        pass
    finally:
        heart.stop()
        opened.close()


if __name__ == "__main__":
    main(serve)
