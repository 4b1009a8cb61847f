"""Stats: what the engine counts and times, in plain numbers. Names for users and the way to the server's /metrics are serve/metrics'."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from trireme.core.step import Clock, Step


@dataclass
class Observed:
    """Seconds, one value an event. A deque takes appends and pops of two threads without a lock."""

    time_to_first_token: deque[float] = field(default_factory=deque)  # arrival to first token
    inter_token: deque[float] = field(default_factory=deque)  # token to token of one sequence
    end_to_end: deque[float] = field(default_factory=deque)  # arrival to the end of a sequence
    queued: deque[float] = field(default_factory=deque)  # arrival to the first slot
    hop: deque[float] = field(default_factory=deque)  # of a step to one stage and back, without the stage's own time


@dataclass
class StageTimes:
    """Seconds of one stage since the engine began. An idle engine's stages do not count as waiting."""

    busy: float = 0.0
    waiting: float = 0.0  # for a step, while others were in flight
    receiving: float = 0.0  # for rows or tokens of other stages

    @property
    def bubble_ratio(self) -> float:
        """Share of the time with work in flight that the stage did not compute; 0 before the first step."""
        total = self.busy + self.waiting + self.receiving
        return 1.0 - self.busy / total if total else 0.0


class Stats:
    """Written by the engine's thread alone. Another thread may read counters and gauges, and pops observations with `drain`."""

    def __init__(self, num_stages: int = 1):
        # gauges
        self.running = 0  # sequences with a slot
        self.waiting = 0  # sequences without
        self.pages_used = 0
        self.pages_total = 0
        self.snapshots_used = 0
        self.snapshots_total = 0
        # counters: they only rise
        self.preemptions = 0
        self.prompt_tokens = 0  # of requests that began to run
        self.cached_tokens = 0  # of those, taken from reused pages
        self.snapshot_hits = 0  # sequences that began from one
        self.generation_tokens = 0
        self.verifications = 0  # of a sequence's drafts, together
        self.drafted_tokens = 0  # of those
        self.accepted_tokens = 0  # of those
        self.steps = 0
        self.rows = 0
        self.sp_steps = 0  # with sequence parallelism on
        self.cp_steps = 0  # with context parallelism on
        self.cp_fallbacks = 0  # steps of prompts too short to cut over cp
        self.epochs = 0  # joined by all stages; every one beyond the first is a repair
        self.faults = 0  # epochs that broke
        self.finished: Counter[str] = Counter()  # sequences by finish_reason
        self.stages = [StageTimes() for _ in range(num_stages)]
        self.observed = Observed()

    def step_planned(self, step: Step, *, falls_back: bool) -> None:
        """`falls_back`: the stages have context parallelism, and the step's prompt rows go without."""
        self.steps += 1
        self.rows += step.num_rows
        self.sp_steps += step.sp
        self.cp_steps += step.cp
        self.cp_fallbacks += falls_back

    def verified(self, num_drafts: int, num_accepted: int) -> None:
        """Drafts of one sequence that a step has verified."""
        self.verifications += 1
        self.drafted_tokens += num_drafts
        self.accepted_tokens += num_accepted

    @property
    def acceptance_length(self) -> float:
        """Mean tokens that a sequence got from a step that verified drafts of it; 0 before the first."""
        return 1 + self.accepted_tokens / self.verifications if self.verifications else 0.0

    def stage_returned(self, stage: int, clock: Clock, hop_s: float, *, was_idle: bool) -> None:
        """One stage's part of one step. `was_idle`: nothing was in flight when the step was sent, so its wait was no bubble."""
        times = self.stages[stage]
        times.busy += clock.busy
        times.receiving += clock.receiving
        if not was_idle:
            times.waiting += clock.waiting
        self.observed.hop.append(hop_s)

    def drain(self) -> dict[str, list[float]]:
        """Observations since the last call, by the names of Observed; they are gone from here."""
        return {name: _pop_all(values) for name, values in vars(self.observed).items()}


def _pop_all(values: deque[float]) -> list[float]:
    return [values.popleft() for _ in range(len(values))]
