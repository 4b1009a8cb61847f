"""Leader: a stage's thin side in the server. Takes messages, keeps steps in order, drives ranks, answers each message once.

No torch, no model, no scheduling. `post` sends a step to the ranks from the caller's own thread; the leader's thread
hears answers and beats, and ends what is late, mute or dead.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import zmq

from trireme.core.control import (
    Answer,
    Fault,
    Found,
    Join,
    Offer,
    Parcel,
    Prepare,
    Prepared,
    Push,
    StageState,
    Status,
    open_answer,
    open_message,
    pack_answer,
    pack_ask,
)
from trireme.core.devices import steps_in_flight
from trireme.core.log import logger
from trireme.core.settings import Settings
from trireme.core.step import Outcome, Step, array, ints, peek_step
from trireme.core.told import MOST_PUSHED_BYTES, ToldRows
from trireme.ranks import channel
from trireme.ranks.launch import Launcher, LocalLauncher
from trireme.ranks.maps import StageMaps
from trireme.ranks.order import Misorder, StepOrder
from trireme.ranks.rank import Rank

_TICK_S = 0.1  # how often the leader looks for the dead and the late
_SLEPT_S = 2.0  # a tick this late means that the leader itself did not run

Done = Callable[[Parcel], None]


@dataclass(eq=False)
class _Call:
    """A message that waits for its one answer."""

    done: Done
    parcel: Parcel
    epoch: int
    number: int = -1
    waits_for: set[int] = field(default_factory=set)  # ranks that have not answered
    answers: dict[int, Parcel] = field(default_factory=dict)  # by rank
    map_version: int = 0  # of the expert maps that a step is stamped with
    counts_loads: bool = False
    tells_experts: bool = False  # of rows that each may have a part of
    rows: bytes = b""  # of a step that records: those of ToldRows
    prepare: Prepare | None = None  # what a rank may fail to do, and the epoch goes on


class Leader:
    """One stage. Every post is answered exactly once, also by `stop`, from any thread."""

    def __init__(
        self,
        settings: Settings,
        stage: int,
        run_dir: Path,
        launcher: Launcher | None = None,
        *,
        maps: Mapping[int, np.ndarray] | None = None,
        push: Callable[[Push], None] | None = None,
    ):
        """`maps`: of experts, that the stage begins with, int32 [num_slots] by layer, where not trivial. `push` gets what the experts
        were given, from any thread, and returns at once; what comes of it is for `prepare`."""
        self._settings, self._stage = settings, stage
        self._log = logger(f"stage_{stage}")
        launcher = launcher or LocalLauncher()
        self._ranks = [Rank(settings, stage, rank, run_dir, launcher, self._log) for rank in range(settings.ranks_per_stage)]
        self._order: StepOrder[_Call] = StepOrder(stage, steps_in_flight(settings))
        self._maps, self._push = StageMaps(maps or {}), push
        self._num_uncounted = 0  # steps since the last push
        self._records = False  # whether the service wants the experts of every row
        self._told = ToldRows(MOST_PUSHED_BYTES)  # since the last push
        self._calls: dict[int, _Call] = {}  # by ticket, with the ranks
        self._tickets = itertools.count(channel.BREAK + 1)
        self._due: list[tuple[Done, Answer | Parcel]] = []  # answers to hand out once the lock is free
        self._pushes: list[Push] = []  # likewise
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._ended = f"stage_{stage} has not started"  # why nothing is taken, or empty
        self._thread = threading.Thread(target=self._lead, name=f"leader_{stage}", daemon=True)

    def start(self) -> None:
        """Returns at once; ranks load meanwhile."""
        self._ended = ""
        self._thread.start()

    def stop(self) -> None:
        """Calls are answered, ranks are gone, sockets are removed."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def state(self) -> StageState:
        with self._lock:
            return self._state()

    def prepare(self, offer: Offer) -> None:
        """New expert maps for this stage, if any, which its ranks lay ready while steps go on: what became of them the next Push says.
        And whether the service wants the experts of every row."""
        with self._locked():
            if not offer.records:
                self._told.take()
            self._records = offer.records
            self._maps.offer(offer)
            self._order_maps()

    def post(self, parcel: Parcel, done: Done) -> None:
        """Take a message of core.control; `done` gets its answer, perhaps before this returns. Never blocks for long."""
        try:
            message = open_message(parcel.packed)
            packed = bytes(message) if isinstance(message, memoryview) else b""
            step = peek_step(packed) if packed else None
        except msgspec.DecodeError as error:
            done(Parcel(pack_answer(self._fault("checksum", f"stage_{self._stage}: message cannot be read: {error}", -1, -1))))
            return
        with self._locked():
            if isinstance(message, Status):
                self._due.append((done, self._state()))
            elif isinstance(message, memoryview):
                assert step is not None, "a message is an ask or a step"
                version = step.maps[self._stage] if step.maps else 0
                call = _Call(done, parcel, step.epoch, step.number, map_version=version)
                call.counts_loads, call.tells_experts = step.counts_loads, bool(step.routed)
                call.rows = _rows_of(step) if step.records else b""
                self._take_step(step, packed, call)
            elif isinstance(message, Prepare):
                self._refuse(_Call(done, parcel, message.epoch), "map", "expert maps come from a stage's own side")
            else:
                self._take_ask(message, _Call(done, parcel, message.epoch))

    # Below, up to `_lead`: under the lock.

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """The leader's state; answers decided inside are handed out after the lock is free, since `done` may post again."""
        due: list[tuple[Done, Answer | Parcel]] = []
        pushes: list[Push] = []
        try:
            with self._lock:
                try:
                    yield
                finally:
                    due, self._due = self._due, []
                    pushes, self._pushes = self._pushes, []
        finally:
            for push in pushes:
                assert self._push is not None, "else nothing is counted"
                self._push(push)
            for done, answer in due:
                try:
                    done(answer if isinstance(answer, Parcel) else Parcel(pack_answer(answer)))
                except Exception:
                    self._log.exception("an answer could not be handed out")

    def _state(self) -> StageState:
        ranks = [rank.state for rank in self._ranks]
        restarts = sum(rank.restarts for rank in self._ranks)
        states = {rank.state for rank in ranks}
        if "failed" in states:
            state = "failed"
        elif states == {"ready"}:
            state = "ready"
        elif restarts or "dead" in states:
            state = "healing"
        else:
            state = "starting" if "starting" in states else "loading"
        snapshots = [rank.num_snapshots for rank in self._ranks if rank.num_snapshots is not None]
        behind = [f"{rank.name} {rank.state.detail or f'is {rank.state.state}'}" for rank in self._ranks if not rank.is_ready]
        return StageState(
            stage=self._stage,
            state=state,
            detail=self._ended or "; ".join(behind),
            epoch=self._order.epoch,
            num_pages=min(rank.num_pages for rank in self._ranks) if state == "ready" else 0,
            num_snapshots=min(snapshots, default=None) if state == "ready" else None,
            activation_bytes=max(rank.activation_bytes for rank in self._ranks) if state == "ready" else 0,
            ranks=ranks,
            reordered=self._order.reordered,
            restarts=restarts,
            map_version=self._maps.version,
        )

    def _unready(self) -> str:
        """Why no message but Status can be taken now, or empty."""
        if self._ended:
            return self._ended
        return "" if all(rank.is_ready for rank in self._ranks) else self._state().detail

    def _take_ask(self, ask: Found | Join, call: _Call) -> None:
        if unready := self._unready():
            self._refuse(call, "unready", unready)
        elif isinstance(ask, Found):
            self._send(call, self._ranks[:1])
        elif ask.epoch <= self._order.epoch:
            self._refuse(call, "stale", f"stage_{self._stage} has seen epoch {self._order.epoch}; epoch {ask.epoch} is over")
        else:
            self._end_epoch("stale", f"epoch {ask.epoch} began")
            self._order.begin(ask.epoch)
            self._maps.begin()
            call.parcel = Parcel(pack_ask(Join(ask.epoch, ask.store, self._maps.version)))
            self._send(call, self._ranks)

    def _take_step(self, step: Step, packed: bytes, call: _Call) -> None:
        """Hold the step, and send all whose turn it is."""
        if unready := self._unready():
            self._refuse(call, "unready", unready)
            return
        try:
            self._order.hold(step, packed, call, time.monotonic())
        except Misorder as misorder:
            self._refuse(call, misorder.kind, misorder.message)
            if misorder.ends_epoch:
                self._end_epoch("stale", misorder.message)
            return
        try:
            while released := self._order.release():
                if wrong := self._maps.stamp(released.map_version):
                    wrong = f"stage_{self._stage}: step {released.number} of epoch {released.epoch}: {wrong}"
                    self._refuse(released, "map", wrong)
                    raise Misorder("map", wrong)
                released.map_version = self._maps.version
                self._send(released, self._ranks)
        except Misorder as misorder:
            self._end_epoch(misorder.kind, misorder.message)

    def _order_maps(self) -> None:
        """Have ranks prepare what was offered, if it is time."""
        if self._order.is_over or self._unready():
            return
        if prepare := self._maps.order(self._order.epoch):
            self._send(_Call(lambda parcel: None, Parcel(pack_ask(prepare)), prepare.epoch, prepare=prepare), self._ranks)

    def _fail_to_prepare(self, prepare: Prepare, rank: Rank, parcel: Parcel) -> None:
        """The stage goes on with the maps that it has."""
        fault = open_answer(parcel.packed)
        assert isinstance(fault, Fault), "the rank says so"
        self._log.warning("%s: %s", rank.name, fault.message)
        self._maps.failed(prepare, f"{rank.name}: {fault.message}")

    def _send(self, call: _Call, ranks: list[Rank]) -> None:
        ticket = next(self._tickets)
        self._calls[ticket] = call
        now = time.monotonic()
        for number, rank in enumerate(ranks):
            call.waits_for.add(number)
            if not rank.order(ticket, call.parcel, now):
                del self._calls[ticket]
                self._refuse(call, "rank", f"{rank.name} cannot be reached")
                self._end_epoch("stale", f"{rank.name} cannot be reached")
                return

    def _end_epoch(self, kind: str, why: str) -> None:
        """Nothing computes on: held steps are refused, and ranks drop their groups so that no other stage waits for them.
        `kind` is what held steps are refused for; of a bad checksum only the first is guilty."""
        if not (self._order.is_over or self._ended):
            self._log.warning("epoch %d ended: %s", self._order.epoch, why)
        self._maps.drop(why)
        for place, call in enumerate(self._order.end(why)):
            self._refuse(call, "stale" if place and kind == "checksum" else kind, why)
        for rank in self._ranks:
            rank.order(channel.BREAK, Parcel(b""), time.monotonic())

    def _refuse(self, call: _Call, kind: str, message: str) -> None:
        self._log.debug("%s fault: %s", kind, message)
        self._due.append((call.done, self._fault(kind, message, call.epoch, call.number)))

    def _fault(self, kind: str, message: str, epoch: int, number: int) -> Fault:
        return Fault(kind, message, self._stage, epoch, number)

    def _lose(self, kind: str, why: str) -> None:
        """All calls that are with the ranks, and those held, end here."""
        for call in self._calls.values():
            self._refuse(call, kind, why)
        self._calls.clear()
        self._end_epoch(kind, why)

    # Below: the leader's thread.

    def _lead(self) -> None:
        context = zmq.Context()
        answers = channel.AnswerSocket(context)
        why = f"stage_{self._stage} is stopping"
        try:
            looked = time.monotonic() - _TICK_S
            while not self._stop.is_set():
                if (now := time.monotonic()) - looked >= _TICK_S:
                    self._look(context, answers, now, slept=now - looked > _SLEPT_S)
                    looked = now
                if answer := answers.receive(_TICK_S):
                    self._hear(answer, answers)
        except Exception as error:
            self._log.exception("the leader's thread ended")
            why = f"stage_{self._stage} is gone: {error}"
        finally:
            with self._locked():
                self._ended = why
                self._lose("unready", why)
                for rank in self._ranks:
                    rank.end(answers)
            answers.close()
            context.term()

    def _hear(self, answer: channel.Answer, answers: channel.AnswerSocket) -> None:
        with self._locked():
            rank, now = self._ranks[answer.rank], time.monotonic()
            if answer.life != rank.life:
                return
            if answer.beat:
                rank.hear(answer.beat, answers, now)
                return
            rank.answered(answer.ticket, now)
            call = self._calls.get(answer.ticket)
            if call is None:  # it was given up before
                return
            call.waits_for.discard(answer.rank)
            call.answers[answer.rank] = answer.parcel
            if answer.fault and call.prepare is not None:
                self._fail_to_prepare(call.prepare, rank, answer.parcel)
            elif answer.fault and call.epoch == self._order.epoch:
                self._end_epoch("stale", f"{rank.name} could not carry out an order of epoch {call.epoch}")
            if answer.fault:
                del self._calls[answer.ticket]
                self._due.append((call.done, answer.parcel))
            elif not call.waits_for:
                del self._calls[answer.ticket]
                self._due.append((call.done, self._complete(call)))
            self._order_maps()

    def _complete(self, call: _Call) -> Parcel:
        """Every rank has answered: the answer of all, which is rank 0's unless it is about experts."""
        first = call.answers[min(call.answers)]
        if call.prepare is not None:
            answers = [open_answer(parcel.packed) for parcel in call.answers.values()]
            self._maps.prepared(call.prepare, sum(answer.moved_bytes for answer in answers if isinstance(answer, Prepared)))
            return first
        if call.number < 0:
            return first
        self._num_uncounted += 1
        tells = call.counts_loads or call.tells_experts or call.rows or self._records
        if not tells and self._maps.settled and self._maps.ready == call.map_version:
            return first
        outcomes = [open_answer(call.answers[rank].packed) for rank in sorted(call.answers)]
        outcomes = [outcome for outcome in outcomes if isinstance(outcome, Outcome)]
        if call.epoch == self._order.epoch and not self._order.is_over:
            self._maps.computed(call.map_version, max(outcome.stalled_s for outcome in outcomes))
        recorded = _together([outcome.recorded for outcome in outcomes])
        if recorded and self._records:
            self._told.add(call.rows, recorded)
        loads = [array(outcome.loads) for outcome in outcomes if outcome.loads]
        if loads and self._push is not None:
            push = self._maps.push(self._stage, call.number, call.map_version, np.sum(loads, axis=0), self._num_uncounted)
            rows, experts, left_out = self._told.take()
            self._pushes.append(msgspec.structs.replace(push, rows=rows, experts=experts, left_out=left_out))
            self._num_uncounted = 0
        answer = msgspec.structs.replace(
            outcomes[0],
            loads=b"",
            map_ready=self._maps.ready,
            routed_experts=_together([outcome.routed_experts for outcome in outcomes]),
            recorded=b"",
            records=self._records,
        )
        return Parcel(pack_answer(answer), first.rows)

    def _look(self, context: zmq.Context, answers: channel.AnswerSocket, now: float, *, slept: bool) -> None:
        """Find the dead and the late; start ranks whose time has come."""
        with self._locked():
            for rank in self._ranks:
                if slept:
                    rank.excuse(now)
                if death := rank.find_death(now):
                    self._log.warning("%s %s", rank.name, death)
                    rank.bury(death, answers, now)
                    self._lose("rank", f"{rank.name} {death}")
                rank.launch_if_due(context, answers, now, self._maps.version, self._maps.maps)
            try:
                self._order.check_gap(now, self._settings.step_timeout_s)
            except Misorder as misorder:
                self._end_epoch(misorder.kind, misorder.message)


def _rows_of(step: Step) -> bytes:
    """ToldRows' columns of every row of a step."""
    slots, starts, counts = array(step.slots), array(step.starts), array(step.counts)
    firsts = np.cumsum(counts) - counts
    positions = np.arange(step.num_rows) + np.repeat(starts - firsts, counts)
    everywhere = np.broadcast_to([[step.epoch], [step.number]], (2, step.num_rows))
    return ints(np.stack([*everywhere, np.repeat(slots, counts), positions], axis=1))


def _together(told: Sequence[bytes]) -> bytes:
    """The experts of rows as ranks tell them: each row from the rank that does not say -1."""
    parts = [np.frombuffer(packed, np.int16) for packed in told if packed]
    return np.max(parts, axis=0).tobytes() if parts else b""
