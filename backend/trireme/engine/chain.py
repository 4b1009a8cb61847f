"""Chain: steps on their way through all stages, and the epochs they live in. What a step holds is the scheduler's matter;
what to do about a fault is the engine's."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from trireme.core.control import (
    Answer,
    Ask,
    Fault,
    Found,
    Founded,
    Join,
    Joined,
    Parcel,
    StageState,
    Status,
    open_answer,
    pack_ask,
    seal_step,
)
from trireme.core.log import logger
from trireme.core.settings import Settings
from trireme.core.step import Outcome, Step, first_checksum, pack_step

_STATUS_TIMEOUT_S = 5.0  # stages answer Status at once
_POLL_EVERY_S = 0.2
_HEAL_EVERY_S = 5.0  # a stage that is being brought back is left in peace for so long


class Stages(Protocol):
    """How the front reaches its stages: BLS calls in the server, leaders in this process offline."""

    num_stages: int

    def post(self, stage: int, parcel: Parcel, timeout_s: float, done: Callable[[Parcel | Exception], None], /) -> None:
        """Thread-safe; returns at once. `done` is called exactly once, from any thread; TimeoutError after timeout_s."""
        ...

    def heal(self, stage: int, error: Exception, /) -> None:
        """A stage did not answer at all: bring it back if this host can. Returns at once."""
        ...


class StageFault(Exception):
    """A stage refused or failed a step or a control message, or did not answer; `str()` names the stage."""


class Returned(NamedTuple):
    """A step that every stage has answered. Times are time.monotonic(), one a stage."""

    step: Step
    outcomes: list[Outcome]
    posted: list[float]
    answered: list[float]

    @property
    def outcome(self) -> Outcome:
        """The last stage's, with the experts that all stages tell of, in the order of layers."""
        if not self.step.routed:
            return self.outcomes[-1]
        told = [np.frombuffer(outcome.routed_experts, np.int16).reshape(self.step.num_routed, -1) for outcome in self.outcomes]
        return msgspec.structs.replace(self.outcomes[-1], routed_experts=np.concatenate(told, axis=1).tobytes())


class Broken(NamedTuple):
    """An epoch that cannot go on."""

    epoch: int
    error: Exception


class Connection(NamedTuple):
    """A new epoch, joined by all stages. `num_pages` and `num_snapshots` are what the smallest stage holds; `sp_from` is that of the
    stage in which sequence parallelism pays last."""

    epoch: int
    num_pages: int
    num_snapshots: int | None  # None where no stage keeps states
    maps: list[int]  # version of the expert maps with which each stage begins
    sp_from: int | None  # None where no stage has measured it


class GivenUp(NamedTuple):
    """A stage has failed for good, as far as it can tell; `error` has its sentence."""

    error: Exception


@dataclass
class _Flight:
    step: Step
    packed: bytes
    timeout_s: float
    posted: list[float]
    answered: list[float]
    outcomes: dict[int, Outcome] = field(default_factory=dict)  # by stage
    lock: threading.Lock = field(default_factory=threading.Lock)  # stages answer from different threads


class Chain:
    """`deliver` gets events from any thread; those of an abandoned epoch's steps do not come.

    On the collective link a step goes to all stages at once and rows pass from rank to rank; on the tensor link it goes
    from stage to stage and takes the rows along.
    """

    def __init__(self, stages: Stages, settings: Settings, deliver: Callable[[Returned | Broken | Connection | GivenUp], None]):
        self.states: list[StageState | None] = [None] * stages.num_stages  # as last heard; None: did not answer
        self._stages = stages
        self._settings = settings
        self._deliver = deliver
        self._log = logger("front")
        self._epoch = -1  # the live one; -1 while there is none
        self._last_epoch = -1
        self._checksum = 0
        self._seen = [False] * stages.num_stages  # answered once
        self._healed_at = [float("-inf")] * stages.num_stages
        self._began = time.monotonic()
        self._closed = threading.Event()

    # ---- steps

    def send(self, step: Step, timeout_s: float) -> None:
        """Post a step of the live epoch, in number order; one Returned or Broken follows."""
        if step.number == 0:
            self._checksum = first_checksum(step.epoch)
        packed, self._checksum = pack_step(step, self._checksum)
        num_stages = self._stages.num_stages
        flight = _Flight(step, seal_step(packed), timeout_s, [0.0] * num_stages, [0.0] * num_stages)
        for stage in range(num_stages) if self._settings.link == "collective" else (0,):
            self._post(flight, stage, None)

    def abandon(self) -> None:
        """End the live epoch here: what its steps still answer is ignored."""
        self._epoch = -1

    def _post(self, flight: _Flight, stage: int, rows) -> None:
        flight.posted[stage] = time.monotonic()
        done = lambda result: self._answered(flight, stage, result)  # noqa: E731
        self._stages.post(stage, Parcel(flight.packed, rows), flight.timeout_s, done)

    def _answered(self, flight: _Flight, stage: int, result: Parcel | Exception) -> None:
        step = flight.step
        if step.epoch != self._epoch:
            return
        answer = _answer_of(result)
        wrong = _what_is_wrong(answer, step, is_last=stage == self._stages.num_stages - 1)
        if wrong:
            self._deliver(Broken(step.epoch, StageFault(f"stage_{stage}, step {step.number}: {wrong}")))
            return
        assert isinstance(answer, Outcome), "nothing else is right"
        with flight.lock:
            flight.answered[stage] = time.monotonic()
            flight.outcomes[stage] = answer
            whole = len(flight.outcomes) == self._stages.num_stages
        if whole:
            outcomes = [flight.outcomes[each] for each in range(self._stages.num_stages)]
            self._deliver(Returned(step, outcomes, flight.posted, flight.answered))
        elif self._settings.link == "tensor" and isinstance(result, Parcel):
            self._post(flight, stage + 1, result.rows)

    # ---- epochs

    def connect(self) -> None:
        """Wait until every stage is ready, then have all join a new epoch: a Connection. Blocks until then or `close`:
        a thread of its own calls it. GivenUp comes once, where a stage fails on the way; waiting goes on all the same."""
        said, given_up = "", False
        while not self._closed.is_set():
            self.poll()
            lack = self.missing()
            if self.failed() and not given_up:
                given_up = True
                self._deliver(GivenUp(StageFault(lack)))
            if not lack:
                try:
                    self._deliver(self._join())
                    return
                except StageFault as fault:
                    lack = str(fault)
            if lack != said:
                said = lack
                self._log.info("no epoch yet: %s", lack)
            self._closed.wait(_POLL_EVERY_S)

    def poll(self) -> None:
        """Ask all stages for their state; those that do not answer are healed."""
        for stage, answer in enumerate(self._ask(Status(), range(self._stages.num_stages), _STATUS_TIMEOUT_S)):
            if isinstance(answer, StageState):
                self.states[stage], self._seen[stage] = answer, True
            else:
                self.states[stage] = None
                self._heal(stage, answer if isinstance(answer, Exception) else StageFault(f"stage_{stage} answered {answer} to Status"))

    def close(self) -> None:
        """Let `connect` return."""
        self._closed.set()

    def missing(self) -> str:
        """What keeps the stages from an epoch, as a sentence for a user; empty when all are ready."""
        return "; ".join(
            f"stage_{stage}: {(state.detail or state.state) if state else 'not answering'}"
            for stage, state in enumerate(self.states)
            if state is None or state.state != "ready"
        )

    def failed(self) -> bool:
        """Whether a stage has given up: its sentence is in `missing`."""
        return any(state is not None and state.state == "failed" for state in self.states)

    def check(self, epoch: int) -> str:
        """What speaks against the live epoch, after a `poll`; empty where nothing does."""
        elsewhere = [f"stage_{s.stage} is in epoch {s.epoch}, not {epoch}" for s in self.states if s is not None and s.epoch != epoch]
        return self.missing() or "; ".join(elsewhere)

    def _join(self) -> Connection:
        """Raises StageFault."""
        states = [state for state in self.states if state is not None]
        epoch = self._last_epoch = max(self._last_epoch, *(state.epoch for state in states)) + 1
        timeout_s = self._settings.step_timeout_s
        store = ""
        if self._settings.meets:
            (founded,) = self._ask(Found(epoch), (0,), timeout_s)
            assert founded is not None, "only a Join is not waited for"
            if not isinstance(founded, Founded):
                raise StageFault(f"stage_0 hosts no rendezvous: {_said(founded)}")
            store = founded.store
        answers = self._ask(Join(epoch, store), range(self._stages.num_stages), timeout_s)
        for stage, answer in enumerate(answers):
            if answer is not None and not isinstance(answer, Joined):
                raise StageFault(f"stage_{stage} did not join epoch {epoch}: {_said(answer)}")
        self._epoch = epoch
        snapshots = [state.num_snapshots for state in states if state.num_snapshots is not None]
        joined = [answer for answer in answers if isinstance(answer, Joined)]
        return Connection(
            epoch,
            num_pages=min(state.num_pages for state in states),
            num_snapshots=min(snapshots, default=None),
            maps=[answer.map_version for answer in joined],
            sp_from=max((answer.sp_from for answer in joined if answer.sp_from is not None), default=None),
        )

    def _heal(self, stage: int, error: Exception) -> None:
        """A stage never seen may still be loading; it has start_timeout_s for that."""
        now = time.monotonic()
        patient = not self._seen[stage] and now - self._began < self._settings.start_timeout_s
        if patient or now - self._healed_at[stage] < _HEAL_EVERY_S:
            return
        self._healed_at[stage] = now
        self._log.warning("stage_%d does not answer (%s): healing it", stage, error)
        self._stages.heal(stage, error)

    def _ask(self, ask: Ask, stages: Iterable[int], timeout_s: float) -> list[Answer | Exception | None]:
        """Post to several stages at once and wait for all of them; of a Join only until one does not, since the others wait
        for that one: None where the answer was not waited for."""
        stages = list(stages)
        answers: list[Answer | Exception | None] = [None for _ in stages]
        left = threading.Semaphore(0)

        def keep(index: int, result: Parcel | Exception) -> None:
            answers[index] = _answer_of(result)
            left.release()

        for index, stage in enumerate(stages):
            self._stages.post(stage, Parcel(pack_ask(ask)), timeout_s, lambda result, index=index: keep(index, result))
        deadline = time.monotonic() + timeout_s + 1  # of our own, should `post` forget its
        for _ in stages:
            if not left.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return [TimeoutError(f"no answer in {timeout_s:.0f} s") if answer is None else answer for answer in answers]
            if isinstance(ask, Join) and not all(answer is None or isinstance(answer, Joined) for answer in answers):
                break
        return list(answers)


def _answer_of(result: Parcel | Exception) -> Answer | Exception:
    if isinstance(result, Exception):
        return result
    try:
        return open_answer(result.packed)
    except Exception as error:  # bytes of another process: whatever is wrong with them is the stage's fault
        return StageFault(f"unreadable answer: {error}")


def _what_is_wrong(answer: Answer | Exception, step: Step, *, is_last: bool) -> str:
    """Why this is no outcome of the step; empty where it is."""
    if not isinstance(answer, Outcome):
        return _said(answer)
    if (answer.epoch, answer.number) != (step.epoch, step.number):
        return f"answered step {answer.number} of epoch {answer.epoch}"
    num_tokens, num_drafts = len(answer.tokens) // 4, len(answer.drafts) // 4
    if is_last and num_tokens != step.num_samples:
        return f"answered {num_tokens} tokens for {step.num_samples} samples"
    if is_last and num_drafts != step.num_drafts:
        return f"answered {num_drafts} drafts of {step.num_drafts}"
    if step.routed and len(answer.routed_experts) % (2 * step.num_routed):
        return f"answered {len(answer.routed_experts)} bytes of experts for {step.num_routed} rows"
    return ""


def _said(answer: Answer | Exception) -> str:
    if isinstance(answer, Fault):
        return f"{answer.kind}: {answer.message}"
    return str(answer) or type(answer).__name__
