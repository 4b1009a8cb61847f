"""Engine: one thread that drives Scheduler and Chain, and mends the chain when it breaks. What runs is the scheduler's choice;
text and servers are serve's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import NamedTuple

from trireme.core.control import StageState
from trireme.core.devices import steps_in_flight
from trireme.core.log import logger
from trireme.core.refusal import Refusal
from trireme.core.request import Emission, Request
from trireme.core.settings import Limits, Settings
from trireme.engine.chain import Broken, Chain, Connection, GivenUp, Returned, StageFault, Stages
from trireme.engine.refusals import queue_full
from trireme.engine.scheduler import Scheduler
from trireme.engine.stats import Stats
from trireme.engine.trace import StepTrace

Listener = Callable[[Emission], None]

_PROBE_AFTER_S = 2.0  # without any answer to a step: a call stranded by a dead stage is found long before its deadline


class _Submitted(NamedTuple):
    request: Request
    listener: Listener


class _Cancelled(NamedTuple):
    request_id: str
    reason: str
    index: int | None


class _Probed(NamedTuple):
    """What a probe of the stages found to be wrong with an epoch; nothing: they are slow, not dead."""

    epoch: int
    wrong: str


class _Stopped(NamedTuple):
    pass


_Event = _Submitted | _Cancelled | Returned | Broken | Connection | GivenUp | _Probed | _Stopped


class Engine:
    """Requests in, emissions out. Listeners are called on the engine's thread: they hand over and return.

    connecting --all stages joined--> running --fault, timeout--> connecting --...
    While connecting, new requests are refused by the name of what is missing; those under way wait and then go on.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        max_model_len: int,
        stages: Stages,
        num_drafts: int = 0,
    ):
        """`num_drafts`: what Settings.mtp says of the checkpoint's head."""
        self.stats = Stats(stages.num_stages)
        self._settings = settings
        self._max_model_len, self._num_drafts = max_model_len, num_drafts
        self._log = logger("front")
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._chain = Chain(stages, settings, self._events.put)
        self._scheduler: Scheduler | None = None  # from the first epoch on, when the number of pages is known
        self._listeners: dict[str, Listener] = {}
        self._news: list[Emission] = []  # not told yet: the next step is planned first
        self._num_submitted = 0  # requests handed in that the scheduler has not seen
        self._lock = threading.Lock()  # for _num_submitted, and so that nothing is submitted after the end
        self._ready = threading.Event()  # connected
        self._refusal: Refusal | None = None  # why it never will be
        self._fault: Exception | None = None  # what broke the last epoch
        self._lost_at = time.monotonic()  # when connecting began
        self._heard_at = 0.0  # when a step last returned or was sent into an idle chain
        self._idle_sent: set[int] = set()  # numbers of steps sent into an idle chain
        self._stage_free_at = [0.0] * stages.num_stages  # when each stage last answered a step
        self._probing = False
        self._stopping = False
        self._trace = StepTrace(Path(settings.step_trace)) if settings.step_trace else None
        self._thread = threading.Thread(target=self._run, name="trireme engine", daemon=True)

    # ---- any thread

    def start(self) -> None:
        """Returns at once; `wait_ready` waits for the stages."""
        self._thread.start()

    def stop(self) -> None:
        """End all requests and the thread. The stages are the caller's to stop."""
        self._events.put(_Stopped())
        if self._thread.is_alive():
            self._thread.join()

    def wait_ready(self, timeout_s: float) -> None:
        """Until the stages are connected; Refusal where one has given up, or when the time is over."""
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(0.1):
            if self._refusal is not None or self._chain.failed() or time.monotonic() > deadline:
                raise self._unavailable()

    def submit(self, request: Request, listener: Listener) -> None:
        """Take a request; its emissions go to `listener`, the last of each sequence with a finish_reason.

        Refusal at once where it can never run, the queue is full, or stages are missing.
        """
        with self._lock:
            scheduler = self._scheduler
            if not self._ready.is_set() or scheduler is None:
                raise self._unavailable()
            scheduler.check(request)
            queued = scheduler.num_queued + self._num_submitted
            if queued >= self._settings.max_queue_size:
                raise queue_full(queued)
            self._num_submitted += 1
            self._events.put(_Submitted(request, listener))

    def cancel(self, request_id: str, reason: str = "cancelled", index: int | None = None) -> None:
        """End a request, or its sequence `index`; "stop" when its text met a stop string. One that has ended is no fault."""
        self._events.put(_Cancelled(request_id, reason, index))

    def state(self) -> tuple[str, list[StageState | None]]:
        """("ready" or a sentence that names what is missing, the stages' states as last heard)."""
        return "ready" if self._ready.is_set() else self._missing(), list(self._chain.states)

    def _missing(self) -> str:
        if self._refusal is not None:
            return str(self._refusal)
        return self._chain.missing() or (f"repairing after {self._fault}" if self._fault else "stages are joining")

    def _unavailable(self) -> Refusal:
        return Refusal("the model is not ready", why=self._missing(), fix="send again later", kind="unavailable")

    # ---- the engine's thread

    def _run(self) -> None:
        try:
            self._connect()
            while not self._stopping:
                self._handle_events()
                self._expire()
                self._plan()
                self._tell()
                self._observe()
            self._close(Refusal("the engine was stopped", kind="unavailable"))
        except Exception as error:  # our own bug: nobody may wait for ever
            self._log.exception("the engine failed")
            self._close(Refusal("the engine failed", why=repr(error), fix="see the log, restart the server", kind="internal"))

    def _close(self, refusal: Refusal) -> None:
        """The end: every request gets `refusal`, also those still in the queue of events."""
        self._chain.abandon()
        self._chain.close()
        with self._lock:
            self._refusal = refusal
            self._ready.clear()
        while not self._events.empty():
            event = self._events.get()
            if isinstance(event, _Submitted):
                self._turn_down(event.request, event.listener, refusal)
        self._end_all(refusal)
        self._tell()
        self._observe()
        if self._trace is not None:
            self._trace.close()

    def _handle_events(self) -> None:
        """All events there are; waits for the first, at most until something is due."""
        try:
            event = self._events.get(timeout=self._until_due())
            while True:
                self._handle(event)
                event = self._events.get_nowait()
        except Empty:
            pass

    def _until_due(self) -> float | None:
        """Seconds to the next deadline of a request, probe or end of patience; None: only an event can change anything."""
        if self._scheduler is None:
            return None
        due = [self._scheduler.next_deadline]
        if not self._ready.is_set() and self._listeners:
            due.append(self._lost_at + self._settings.start_timeout_s)
        if self._ready.is_set() and self._scheduler.num_in_flight and not self._probing:
            due.append(self._heard_at + _PROBE_AFTER_S)
        times = [when for when in due if when is not None]
        return min(max(0.0, min(times) - time.monotonic()), threading.TIMEOUT_MAX) if times else None

    def _handle(self, event: _Event) -> None:
        match event:
            case Returned():
                self._learn(event)
            case _Submitted(request, listener):
                self._add(request, listener)
            case _Cancelled(request_id, reason, index):
                if self._scheduler is not None:
                    self._news += self._scheduler.cancel(request_id, reason, index)
            case Broken(epoch, error):
                self._break(epoch, error)
            case Connection():
                self._connected(event)
            case GivenUp(error):
                self._end_all(Refusal("the model is gone", why=str(error), fix="see the log of that stage", kind="unavailable"))
            case _Probed(epoch, wrong):
                self._probing, self._heard_at = False, time.monotonic()
                if wrong:
                    self._break(epoch, StageFault(wrong))
            case _Stopped():
                self._stopping = True

    def _add(self, request: Request, listener: Listener) -> None:
        with self._lock:
            self._num_submitted -= 1
        assert self._scheduler is not None, "submit saw a scheduler"
        if request.id in self._listeners:
            self._tell()  # the end of the id's last use may be among the news
        try:
            self._scheduler.add(request)
        except Refusal as refusal:  # what `submit` could not see: an id in use, a repair that left fewer pages
            self._turn_down(request, listener, refusal)
        else:
            self._listeners[request.id] = listener

    def _learn(self, returned: Returned) -> None:
        step, scheduler = returned.step, self._live(returned.step.epoch)
        if scheduler is None:
            return
        self._heard_at = time.monotonic()
        was_idle = step.number in self._idle_sent
        self._idle_sent.discard(step.number)
        for stage, outcome in enumerate(returned.outcomes):
            clock, answered = outcome.clock, returned.answered[stage]
            began = max(returned.posted[stage], self._stage_free_at[stage])  # before that it computed older steps
            self._stage_free_at[stage] = answered
            self.stats.stage_returned(stage, clock, max(0.0, answered - began - clock.busy - clock.receiving), was_idle=was_idle)
        if self._trace is not None:
            self._trace.write(returned.outcomes, step.num_rows, step.num_samples, self._heard_at)
        scheduler.time(step, [outcome.clock for outcome in returned.outcomes], was_idle=was_idle)
        scheduler.maps_ready(outcome.map_ready for outcome in returned.outcomes)
        scheduler.records = any(outcome.records for outcome in returned.outcomes)
        self._news += scheduler.learn(returned.outcome)

    def _expire(self) -> None:
        """What time alone brings about."""
        if self._scheduler is None:
            return
        self._news += self._scheduler.expire()
        now = time.monotonic()
        if not self._ready.is_set():
            if self._listeners and now >= self._lost_at + self._settings.start_timeout_s:
                self._end_all(self._unavailable())
        elif self._scheduler.num_in_flight and not self._probing and now >= self._heard_at + _PROBE_AFTER_S:
            self._probe(self._scheduler.epoch)

    def _plan(self) -> None:
        scheduler = self._scheduler
        if scheduler is None or not self._ready.is_set():
            return
        while (step := scheduler.next()) is not None:
            if scheduler.num_in_flight == 1:
                self._heard_at = time.monotonic()
                self._idle_sent.add(step.number)
            # A step waits for those before it, each of which may take its time.
            self._chain.send(step, self._settings.step_timeout_s * scheduler.num_in_flight)

    def _tell(self) -> None:
        """Hand the news to their listeners."""
        news, self._news = self._news, []
        for emission in news:
            self._call(self._listeners[emission.request_id], emission)
        for emission in news:  # only now: sequences of one request may end together
            if emission.finish_reason is not None and self._scheduler is not None and emission.request_id not in self._scheduler:
                self._listeners.pop(emission.request_id, None)

    def _call(self, listener: Listener, emission: Emission) -> None:
        try:
            listener(emission)
        except Exception:
            self._log.exception("a listener failed: its request %s is cancelled", emission.request_id)
            self.cancel(emission.request_id)

    def _turn_down(self, request: Request, listener: Listener, refusal: Refusal) -> None:
        """End a request that the scheduler does not have."""
        for index in range(request.sampling.n):
            self._call(listener, Emission(request_id=request.id, index=index, finish_reason="error", error=refusal))

    def _end_all(self, error: Exception) -> None:
        """Every request ends with `error`, also those that the scheduler has not seen."""
        if self._scheduler is not None:
            self._news += self._scheduler.fail_all(error)

    def _observe(self) -> None:
        if self._scheduler is not None:
            stats, scheduler = self.stats, self._scheduler
            stats.running, stats.waiting = scheduler.num_running, scheduler.num_waiting
            stats.pages_used, stats.pages_total = scheduler.num_pages_used, scheduler.limits.num_pages
            stats.snapshots_used, stats.snapshots_total = scheduler.num_snapshots_used, scheduler.limits.num_snapshots or 0

    # ---- epochs

    def _break(self, epoch: int, error: Exception) -> None:
        """End the epoch, if it lives: what it has not answered is computed again in the next."""
        if self._live(epoch) is None:
            return
        self._log.warning("epoch %d broke: %s", epoch, error)
        self.stats.faults += 1
        self._ready.clear()
        self._fault = error
        self._lost_at = time.monotonic()
        self._chain.abandon()
        self._connect()

    def _live(self, epoch: int) -> Scheduler | None:
        """The scheduler, where the epoch is its own and not broken."""
        scheduler = self._scheduler
        return scheduler if scheduler is not None and self._ready.is_set() and scheduler.epoch == epoch else None

    def _connect(self) -> None:
        """A thread of its own waits for the stages, so that this one can go on ending requests."""
        threading.Thread(target=self._chain.connect, name="trireme connect", daemon=True).start()

    def _connected(self, connection: Connection) -> None:
        epoch, num_pages, num_snapshots, maps, sp_from = connection
        if self._scheduler is None:
            try:
                limits = Limits.of(
                    self._settings,
                    inflight=steps_in_flight(self._settings),
                    max_model_len=self._max_model_len,
                    num_pages=num_pages,
                    num_snapshots=num_snapshots,
                    num_drafts=self._num_drafts,
                    sp_from=sp_from,
                )
            except Refusal as refusal:  # stays: it takes other settings
                self._refusal = refusal
                return
            self._scheduler = Scheduler(limits, time.monotonic, self.stats, epoch, maps)
        else:
            self._news += self._scheduler.restart(epoch, num_pages, self._fault, num_snapshots, maps, sp_from)
        self._idle_sent.clear()
        self.stats.epochs += 1
        said = "" if num_snapshots is None else f", {num_snapshots} snapshots"
        said += "" if sp_from is None else f", sequence parallelism from {sp_from} rows of a step on"
        self._log.info("epoch %d: %d stages, %d pages%s", epoch, len(self._chain.states), num_pages, said)
        self._ready.set()

    def _probe(self, epoch: int) -> None:
        """Ask the stages how they are, while steps stay unanswered; a thread of its own waits for them."""
        self._probing = True

        def probe() -> None:
            self._chain.poll()
            self._events.put(_Probed(epoch, self._chain.check(epoch)))

        threading.Thread(target=probe, name="trireme probe", daemon=True).start()
