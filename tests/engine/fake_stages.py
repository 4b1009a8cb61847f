"""Stages in threads for Engine and Chain: each checks what it gets as a leader would, the last runs the toy; faults on demand."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter

import msgspec
import numpy as np

from engine.toy import Toy
from trireme.core.control import (
    Fault,
    Found,
    Founded,
    Join,
    Joined,
    Parcel,
    StageState,
    Status,
    open_message,
    pack_answer,
)
from trireme.core.step import Clock, Outcome, first_checksum, peek_step, verify_step


class FakeStage:
    """One stage: steps are held until their turn, computed in order, answered after a random delay."""

    def __init__(self, stage: int, stages: FakeStages):
        self.stage, self.stages = stage, stages
        self.state, self.detail = "ready", ""
        self.epoch, self.number, self.checksum, self.early = -1, 0, 0, {}
        self.map_version = self.map_ready = 0
        self.num_counted = 0  # steps since loads were reported
        self.lock = threading.Lock()

    def take(self, parcel: Parcel, answer) -> None:
        message = open_message(parcel.packed)
        with self.lock:
            if isinstance(message, Status):
                pages, snapshots = self.stages.num_pages + self.stage, self.stages.snapshots_of(self.stage)
                answer(StageState(self.stage, self.state, self.detail, self.epoch, num_pages=pages, num_snapshots=snapshots))
            elif isinstance(message, Found):
                answer(Founded(message.epoch, "here:1"))
            elif isinstance(message, Join):
                assert message.epoch > self.epoch
                self.epoch, self.number, self.checksum, self.early = message.epoch, 0, first_checksum(message.epoch), {}
                if self.stage == self.stages.num_stages - 1:
                    self.stages.toy.join(message.epoch)
                self.map_ready, self.num_counted = self.map_version, 0  # what was not stamped is gone
                answer(Joined(message.epoch, self.map_version, self.stages.sp_from[self.stage] if self.stages.sp_from else None))
            else:
                step = peek_step(bytes(message))
                if step.epoch != self.epoch:
                    answer(Fault("stale", "old epoch", self.stage, step.epoch, step.number))
                    return
                self.early[step.number] = (bytes(message), step, parcel.rows, answer)
                while self.number in self.early and self.epoch == step.epoch:  # none after a fault
                    self.run(*self.early.pop(self.number))

    def run(self, packed, step, rows, answer) -> None:
        self.checksum = verify_step(packed, self.checksum)
        self.number += 1
        self.use_maps(step)
        if self.stages.link == "tensor":
            assert (rows is None) == (self.stage == 0), "rows go from stage to stage"
            assert rows is None or rows.tolist() == [step.number % 251, self.stage]
        clock = Clock(began=time.time(), busy=1e-4)
        wrong = self.stages.fault(self.stage, step)
        if wrong == "mute":
            answer = lambda value, rows=None: None  # noqa: E731
        elif wrong:
            self.epoch = -1
            answer(Fault("rank", wrong, self.stage, step.epoch, step.number))
            return
        if self.stage == self.stages.num_stages - 1:
            outcome = self.stages.toy.run(step)
            drafts = self.stages.redraft(outcome.drafts)
            answer(msgspec.structs.replace(outcome, stage=self.stage, clock=clock, drafts=drafts, map_ready=self.map_ready))
        else:
            outcome = Outcome(step.epoch, step.number, self.stage, clock=clock, map_ready=self.map_ready)
            answer(outcome, np.array([step.number % 251, self.stage + 1], np.uint8))

    def use_maps(self, step) -> None:
        """Commit what the step says, and now and then have the next maps ready."""
        stamped = step.maps[self.stage] if step.maps else 0
        assert stamped in (self.map_version, self.map_ready), "maps that go back, or that nobody has"
        self.stages.num_commits += stamped > self.map_version
        self.map_version = stamped
        if self.map_ready == self.map_version and self.stages.rng.random() < self.stages.rebalances:
            self.map_ready += 1 + self.stage  # versions are each stage's own
        self.num_counted += 1
        if step.counts_loads:
            self.stages.reports[self.num_counted] += 1
            self.num_counted = 0


class FakeStages:
    """`fault(stage, step)` may return a message to fail with, or "mute" to lose its answer; `gone` stages answer nothing."""

    def __init__(
        self,
        num_stages: int,
        *,
        link="collective",
        num_pages=64,
        num_snapshots=None,
        num_drafts=0,
        delay_s=0.002,
        fault=lambda stage, step: None,
        rebalances=0.0,
        sp_from=(),
    ):
        self.num_stages, self.link, self.num_pages, self.delay_s, self.fault = num_stages, link, num_pages, delay_s, fault
        self.toy = Toy(num_pages, 0, num_snapshots, num_drafts)
        self.sp_from = sp_from  # that stages measure, or nothing
        self.rebalances = rebalances  # how likely a stage has other expert maps ready after a step
        self.num_commits = 0
        self.reports: Counter[int] = Counter()  # by the number of steps that a report of loads sums up
        self.redraft = lambda drafts: drafts
        self.stages = [FakeStage(stage, self) for stage in range(num_stages)]
        self.gone: set[int] = set()
        self.healed: Counter[int] = Counter()
        self.rng = random.Random(0)

    def snapshots_of(self, stage: int) -> int | None:
        """What a stage reports: with several, stage 0 has no layer with states and the last has room for the fewest."""
        if self.toy.num_snapshots is None or (stage == 0 and self.num_stages > 1):
            return None
        return self.toy.num_snapshots + self.num_stages - 1 - stage

    def post(self, stage, parcel, timeout_s, done) -> None:
        once = threading.Lock()

        def finish(result) -> None:
            if once.acquire(blocking=False):
                expire.cancel()
                done(result)

        def answer(value, rows=None) -> None:
            result = Parcel(pack_answer(value), rows)
            self.later(lambda: finish(result))

        def arrive() -> None:
            if stage in self.gone:
                finish(ConnectionError("stub is dead"))
            else:
                self.stages[stage].take(parcel, answer)

        expire = threading.Timer(timeout_s, lambda: finish(TimeoutError(f"no answer in {timeout_s} s")))
        expire.daemon = True
        expire.start()
        self.later(arrive)

    def later(self, call) -> None:
        timer = threading.Timer(self.rng.random() * self.delay_s, call)
        timer.daemon = True
        timer.start()

    def heal(self, stage, error) -> None:
        self.healed[stage] += 1
        self.gone.discard(stage)
        self.stages[stage] = FakeStage(stage, self)
