"""Launch: how a leader starts its ranks. Local processes here, in a pool in pool.py; actors on other hosts have the same two classes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import msgspec

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings


class Brief(msgspec.Struct, frozen=True, kw_only=True):
    """All that a rank is told when it starts: one JSON argument of its command line, or a message of its pool."""

    stage: int
    rank: int
    life: int  # how often this rank was started, from 1
    leader: int  # process id that the rank must not outlive
    run_dir: str
    settings: Settings
    map_version: int = 0  # of the stage's expert maps
    maps: dict[int, bytes] = {}  # as in Prepare, but int16 (an argument has at most 128 KiB); layers that are not here have the trivial one


class RankProcess(Protocol):
    """A started rank."""

    pid: int

    def exit_code(self) -> int | None:
        """None while it runs."""
        ...

    def kill(self) -> None:
        """End it at once and wait until it is gone. It is not used afterwards."""
        ...


class Launcher(Protocol):
    """Called from the leader's thread, which lives as long as the leader."""

    def launch(self, brief: Brief) -> RankProcess: ...


class LocalLauncher:
    """Ranks as child processes on this host, `python -m MODULE BRIEF`.

    They run under $TRIREME_PYTHON or else this interpreter. A rank ties its life to the thread that started it
    (PR_SET_PDEATHSIG, set by the worker itself: a hook between fork and exec is not safe in a process with threads).
    """

    def __init__(self, module: str = "trireme.ranks.worker"):
        self._module = module

    def launch(self, brief: Brief) -> RankProcess:
        threads = brief.settings.threads(brief.settings.world)
        return LocalProcess(self._module, msgspec.json.encode(brief).decode(), threads=threads)


class LocalProcess:
    """`python -m MODULE ARGUMENTS` with `threads` CPU threads, a RankProcess. `stdin`: a file descriptor."""

    def __init__(self, module: str, *arguments: str, threads: int, stdin: int = subprocess.DEVNULL):
        python = os.environ.get("TRIREME_PYTHON") or sys.executable
        if not python:
            raise Refusal("no Python to run ranks with", why="this process embeds its interpreter", fix="set TRIREME_PYTHON")
        # OpenMP threads that spin while a server shares their cores stall a step tenfold (measured); asleep, they are steady.
        # A store or peer that is gone is a page of C++ frames in torch's warnings, and a line in the rank's own.
        # A collective that hangs is the leader's to end; left to itself, torch would end the rank, and its weights with it.
        # Streams that share a hardware queue wait for each other; one that waits for another stage must not hold up a computing one.
        nccl = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
        environment = {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"} | nccl | os.environ
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if roots := _import_roots():
            environment["PYTHONPATH"] = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
        try:
            self._process = subprocess.Popen(
                [python, "-m", module, *arguments],
                env=environment,
                stdin=stdin,
                stdout=2,  # the server's log is its stderr
                start_new_session=True,  # Ctrl-C in a terminal is for the leader, which then ends its ranks
            )
        except OSError as error:
            raise Refusal(f"{python} does not start", why=str(error), fix="set TRIREME_PYTHON to a Python that has torch") from None
        self.pid = self._process.pid

    def exit_code(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _import_roots() -> list[str]:
    """The folders of a source tree that hold packages; none where the wheel is installed (then the rank's Python has it too)."""
    home = Path(__file__).resolve().parents[3]
    return [str(home / root) for root in ("backend", "kernels", "tools")] if (home / "kernels").is_dir() else []
