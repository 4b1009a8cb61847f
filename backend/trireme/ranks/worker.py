"""Worker: `python -m trireme.ranks.worker BRIEF`, the process of one rank: tied to its leader, beating, then on duty.

torch is imported only after the first two.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec

from trireme.core.refusal import Refusal
from trireme.ranks.channel import Beat, RankChannel
from trireme.ranks.launch import Brief

_BEAT_S = 0.5
_PR_SET_PDEATHSIG = 1


class Heart:
    """Beats from a thread of its own, so that a rank that computes is not taken for a mute one."""

    def __init__(self, channel: RankChannel):
        self._channel, self._beat = channel, Beat("starting")
        threading.Thread(target=self._run, name="heart", daemon=True).start()

    def tell(self, state: str, detail: str = "", num_pages: int = 0) -> None:
        """Beat this from now on; the first time at once."""
        self._beat = Beat(state, detail, num_pages)
        self._channel.beat(self._beat)

    def _run(self) -> None:
        while True:
            self._channel.beat(self._beat)
            time.sleep(_BEAT_S)


def tie_to(leader: int) -> None:
    """Die with the leader's thread, however it ends; at once if that has happened already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != leader:
        sys.exit("the leader is gone")


def main() -> None:
    brief = msgspec.json.decode(sys.argv[1], type=Brief)
    tie_to(brief.leader)
    channel = RankChannel(Path(brief.run_dir), brief.stage, brief.rank, brief.life)
    heart = Heart(channel)
    try:
        from trireme.ranks.duty import Duty  # seconds: torch
        from trireme.ranks.runner import load_runner

        heart.tell("loading", "is loading")
        runner = load_runner(brief.settings, brief.stage, brief.rank, progress=lambda sentence: heart.tell("loading", sentence))
    except Refusal as refusal:
        heart.tell("failed", str(refusal))
        signal.pause()  # until the leader has heard it and ends this rank
        return
    heart.tell("ready", num_pages=runner.num_pages)
    Duty(brief, channel, runner).do()


if __name__ == "__main__":
    main()
