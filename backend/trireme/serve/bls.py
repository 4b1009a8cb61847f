"""BlsCalls: requests from model to model inside the server (BLS), with deadlines of our own. BlsStages: the engine's way to its stages.

A call to a stub that died never returns, and new ones fail after a second (both measured). So each call runs in a
thread that may be given up: a spare one takes its place, and the lost ones are counted. Each of them also keeps a thread
of the server's pool (`thread-pool-size`), and delays the server's end until its exit timeout.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from trireme.core.control import Parcel
from trireme.core.log import logger

Done = Callable[[Parcel | Exception], None]

SETTLE_S = 2.0  # from a model's `initialize` to its first call (see Front._start); ranks take longer to load
_LOOK_S = 0.05  # between looks at the open calls
_DEAD = "is not healthy"  # in the server's error, where a model's stub has died
_GONE = ("unknown model", "is not ready", "not found")  # where a model is not loaded


@dataclass(eq=False)
class _Call:
    model: int
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


class BlsCalls:
    """Calls to some models, by their place in `models`. `call(model, parcel)` asks one and waits; as many as `num_threads` can be
    open at once."""

    def __init__(self, models: Sequence[str], call: Callable[[str, Parcel], Parcel], *, num_threads: int):
        self.num_abandoned = 0  # threads that wait for ever
        self._models, self._call, self._num_threads = models, call, num_threads
        self._queue: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._open: set[_Call] = set()
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

    def post(self, model: int, parcel: Parcel, timeout_s: float, done: Done) -> None:
        """Thread-safe; returns at once. `done` gets the answer, the server's error, or TimeoutError, exactly once."""
        now = time.monotonic()
        call = _Call(model, parcel, done, now, now + timeout_s)
        with self._lock:
            stopping = self._stop.is_set()
            if not stopping:
                self._open.add(call)
                self._queue.put(call)
        if stopping:
            call.settle(_stopping())

    def ask(self, model: int, parcel: Parcel, timeout_s: float) -> Parcel:
        """The answer; raises what `post` gives in place of one."""
        results: queue.SimpleQueue[Parcel | Exception] = queue.SimpleQueue()
        self.post(model, parcel, timeout_s, results.put)
        result = results.get()
        if isinstance(result, Exception):
            raise result
        return result

    def _add_thread(self) -> None:
        threading.Thread(target=self._work, name="bls", daemon=True).start()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            with call.lock:
                call.running = not call.settled
            if not call.running:
                continue
            try:
                result: Parcel | Exception = self._call(self._models[call.model], call.parcel)
            except Exception as error:
                result = error
            with self._lock:
                self._open.discard(call)
            if not call.settle(result):  # it was given up: a spare thread has this one's place
                with self._lock:
                    self.num_abandoned -= 1
                return
            if isinstance(result, Exception) and _DEAD in str(result):
                self._found_dead(call.model, result, call.began)

    def _found_dead(self, model: int, error: Exception, asked: float) -> None:
        """The model's stub has died; `error` says so to a call that began at `asked`."""

    def _watch(self) -> None:
        while not self._stop.wait(_LOOK_S):
            now = time.monotonic()
            late = self._take_open(lambda call, now=now: now > call.deadline)
            self._give_up(late, lambda call: TimeoutError(f"{self._models[call.model]} did not answer in time"))

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


class BlsStages(BlsCalls):
    """The engine's `Stages` over BLS: the first `num_stages` of `models`. Any that dies is loaded again.

    `reload(model)` unloads and loads it, or is None where the server does not let models do so. `thread_pool`: of the server.
    """

    def __init__(
        self,
        num_stages: int,
        models: Sequence[str],
        call: Callable[[str, Parcel], Parcel],
        reload: Callable[[str], None] | None,
        *,
        num_threads: int,
        thread_pool: int,
    ):
        super().__init__(models, call, num_threads=num_threads)
        self.num_stages = num_stages
        self.num_reloads = 0
        self._reload, self._thread_pool = reload, thread_pool
        self._log = logger("front")
        self._healing: set[int] = set()
        self._loaded_at: dict[int, float] = {}  # by model: when it was last tried

    def heal(self, model: int, error: Exception) -> None:
        """Load a model again that is not loaded; one that is only slow is left alone, and a dead one is found here first."""
        if any(words in str(error) for words in _GONE):
            self._found_dead(model, error, time.monotonic())

    def _found_dead(self, model: int, error: Exception, asked: float) -> None:
        """Bring it back, unless it was loaded since."""
        with self._lock:
            if self._stop.is_set() or model in self._healing or asked < self._loaded_at.get(model, 0.0):
                return
            self._healing.add(model)
        self._give_up(self._take_open(lambda call: call.model == model), lambda call: error)
        threading.Thread(target=self._heal, args=(model,), name=f"heal_{model}", daemon=True).start()

    def _heal(self, model: int) -> None:
        name = self._models[model]
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
                self._loaded_at[model] = time.monotonic()
                self._healing.discard(model)


def _stopping() -> ConnectionError:
    return ConnectionError("this model is stopping")
