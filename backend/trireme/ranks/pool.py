"""RankPool: workers that outlive the ranks they are, a Launcher. One that is told to leave drops its model and plan and takes the
next, without importing torch again: tests of many plans live on this, and re-planning a live server will."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe

import msgspec

from trireme.ranks.launch import Brief, LocalProcess, RankProcess

_GRACE_S = 1.5  # for a rank to leave by itself: one that computes or waits for another rank cannot


class RankPool:
    """Leaders of any threads may share one. Workers have one CPU thread, until a brief says otherwise to torch."""

    def __init__(self, module: str = "trireme.ranks.worker"):
        self._module = module
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        # a worker dies with the thread that started it, so that is not a leader's, which may end before the pool
        self._starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rank_pool")

    def launch(self, brief: Brief) -> RankProcess:
        """An idle worker, or a new one, takes the brief. Its `kill` gives it back, so the leader must not use it afterwards."""
        with self._lock:
            self._workers = [worker for worker in self._workers if worker.exit_code() is None]
            worker = next((worker for worker in self._workers if worker.idle), None)
            if worker is None:
                worker = self._starter.submit(_Worker, self._module).result()
                self._workers.append(worker)
            worker.begin(brief)
        return worker

    def close(self) -> None:
        """End all workers, whatever they do."""
        with self._lock:
            for worker in self._workers:
                worker.end()
            self._workers = []
        self._starter.shutdown()


class _Worker:
    """A process that is one rank after another; to a leader, the rank that it is now."""

    def __init__(self, module: str):
        self.idle = True
        self._connection, stdin = Pipe()
        with stdin:
            self._process = LocalProcess(module, "--pool", str(os.getpid()), threads=1, stdin=stdin.fileno())
        self.pid = self._process.pid

    def begin(self, brief: Brief) -> None:
        self.idle = False
        with contextlib.suppress(OSError):  # it has died just now: its exit code will tell
            self._connection.send_bytes(msgspec.json.encode(brief))

    def exit_code(self) -> int | None:
        return self._process.exit_code()

    def kill(self) -> None:
        """End this life, politely if it can be; if not, the process."""
        try:
            self._connection.send_bytes(b"leave")
            self.idle = self._connection.poll(_GRACE_S) and self._connection.recv_bytes() == b"left"
        except (EOFError, OSError):
            self.idle = False
        if not self.idle:
            self.end()

    def end(self) -> None:
        self._process.kill()
        self._connection.close()
