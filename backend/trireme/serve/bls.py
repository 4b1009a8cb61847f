"""BlsStages: the engine's way to its stages, as requests from model to model inside the server (BLS), with deadlines of our own.

A call to a stub that died never returns, and new ones fail after a second (both measured). So each call runs in a
thread that may be given up: a spare one takes its place, and the lost ones are counted. Each of them also keeps a thread
of the server's pool (`thread-pool-size`), and delays the server's end until its exit timeout.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from trireme.core.control import Parcel
from trireme.core.log import logger
from trireme.serve.repository import stage_name

Done = Callable[[Parcel | Exception], None]

_LOOK_S = 0.05  # between looks at the open calls
_DEAD = "is not healthy"  # in the server's error, where a model's stub has died
_GONE = ("unknown model", "is not ready", "not found")  # where a model is not loaded


@dataclass(eq=False)
class _Call:
    stage: int
    parcel: Parcel
    done: Done
    began: float  # time.monotonic() seconds
    deadline: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    running: bool = False  # a thread waits for its answer
    settled: bool = False

    def settle(self, result: Parcel | Exception) -> bool:
        """Hand out the one result; False where it has had one."""
        with self.lock:
            if self.settled:
                return False
            self.settled = True
        self.done(result)
        return True


class BlsStages:
    """The engine's `Stages` over BLS.

    `call(model, parcel)` asks one model and waits. `reload(model)` unloads and loads it, or is None where the server
    does not let models do so. As many calls as `num_threads` can be open at once, of `thread_pool` in the server.
    """

    def __init__(
        self,
        num_stages: int,
        call: Callable[[str, Parcel], Parcel],
        reload: Callable[[str], None] | None,
        *,
        num_threads: int,
        thread_pool: int,
    ):
        self.num_stages = num_stages
        self.num_abandoned = 0  # threads that wait for ever
        self.num_reloads = 0
        self._call, self._reload, self._num_threads, self._thread_pool = call, reload, num_threads, thread_pool
        self._log = logger("front")
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._open: set[_Call] = set()
        self._healing: set[int] = set()
        self._loaded_at: dict[int, float] = {}  # by stage: when it was last tried
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="bls_watch", daemon=True)

    def start(self) -> None:
        for _ in range(self._num_threads):
            self._add_thread()
        self._watcher.start()

    def stop(self) -> None:
        """Open calls end with an error, as later ones do at once; threads that can end do."""
        with self._lock:
            self._stop.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._give_up(self._take_open(lambda call: True), lambda call: _stopping())
        for _ in range(self._num_threads):
            self._queue.put(None)

    def post(self, stage: int, parcel: Parcel, timeout_s: float, done: Done) -> None:
        """Thread-safe; returns at once. `done` gets the answer, the server's error, or TimeoutError, exactly once."""
        now = time.monotonic()
        call = _Call(stage, parcel, done, now, now + timeout_s)
        with self._lock:
            stopping = self._stop.is_set()
            if not stopping:
                self._open.add(call)
                self._queue.put(call)
        if stopping:
            call.settle(_stopping())

    def heal(self, stage: int, error: Exception) -> None:
        """Load a stage again that is not loaded; one that is only slow is left alone, and a dead one is found here first."""
        if any(words in str(error) for words in _GONE):
            self._bring_back(stage, error, time.monotonic())

    def _bring_back(self, stage: int, error: Exception, asked: float) -> None:
        """Unless it was loaded since `asked`, when the call with this error began."""
        with self._lock:
            if self._stop.is_set() or stage in self._healing or asked < self._loaded_at.get(stage, 0.0):
                return
            self._healing.add(stage)
        self._give_up(self._take_open(lambda call: call.stage == stage), lambda call: error)
        threading.Thread(target=self._heal, args=(stage,), name=f"heal_{stage}", daemon=True).start()

    def _heal(self, stage: int) -> None:
        name = stage_name(stage)
        try:
            if self._reload is None:
                self._log.error(
                    "%s has died, and this server loads models only when it starts: start it again, or use `trireme serve`", name
                )
                self._stop.wait(60)  # that is said once a minute
                return
            self._log.warning("%s has died: loading it again", name)
            self._reload(name)
            self.num_reloads += 1
            self._log.warning("%s is loaded again", name)
            if self.num_abandoned + 2 * self._num_threads > self._thread_pool:
                lost = "%d calls to dead models hold threads of the server, which has %d (fix: start it again soon)"
                self._log.error(lost, self.num_abandoned, self._thread_pool)
        except Exception as error:
            self._log.error("%s could not be loaded again: %s", name, error)
        finally:
            with self._lock:
                self._loaded_at[stage] = time.monotonic()
                self._healing.discard(stage)

    def _add_thread(self) -> None:
        threading.Thread(target=self._work, name="bls", daemon=True).start()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            with call.lock:
                call.running = not call.settled
            if not call.running:
                continue
            try:
                result: Parcel | Exception = self._call(stage_name(call.stage), call.parcel)
            except Exception as error:
                result = error
            with self._lock:
                self._open.discard(call)
            if not call.settle(result):  # it was given up: a spare thread has this one's place
                with self._lock:
                    self.num_abandoned -= 1
                return
            if isinstance(result, Exception) and _DEAD in str(result):
                self._bring_back(call.stage, result, call.began)

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_S):
            now = time.monotonic()
            late = self._take_open(lambda call, now=now: now > call.deadline)
            self._give_up(late, lambda call: TimeoutError(f"{stage_name(call.stage)} did not answer in time"))

    def _take_open(self, which: Callable[[_Call], bool]) -> list[_Call]:
        with self._lock:
            taken = [call for call in self._open if which(call)]
            self._open.difference_update(taken)
        return taken

    def _give_up(self, calls: Iterable[_Call], error_of: Callable[[_Call], Exception]) -> None:
        """End calls without their answers. A thread that waits for one is lost, perhaps for ever."""
        for call in calls:
            if call.settle(error_of(call)) and call.running:
                with self._lock:
                    self.num_abandoned += 1
                if not self._stop.is_set():
                    self._add_thread()


def _stopping() -> ConnectionError:
    return ConnectionError("the front is stopping")
