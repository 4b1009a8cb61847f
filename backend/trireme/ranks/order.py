"""StepOrder: steps in, out of order; the same steps out, by number. Every deviation is named. No sockets and no clock here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from trireme.core.refusal import Refusal
from trireme.core.step import Step, first_checksum, verify_step

Call = TypeVar("Call")


class Misorder(Exception):
    """A step that must not be computed. `kind` is that of core.control.Fault; `ends_epoch` tells whether anything else may be."""

    def __init__(self, kind: str, message: str, *, ends_epoch: bool = True):
        super().__init__(message)
        self.kind, self.message, self.ends_epoch = kind, message, ends_epoch


@dataclass
class _Early(Generic[Call]):
    packed: bytes
    call: Call
    since: float


class StepOrder(Generic[Call]):
    """The line of steps before one stage. BLS keeps no order, so early steps are held:

    arrives   4 6 5        held {6}, then {}
    released  4 . 5 6      `window` is how far ahead of the next number a step may be
    """

    def __init__(self, stage: int, window: int):
        self.epoch = -1
        self.reordered = 0  # steps that came early and were held
        self._stage, self._window = stage, window
        self._next, self._checksum = 0, 0
        self._held: dict[int, _Early[Call]] = {}
        self._over = "no epoch was joined"  # why nothing may be computed, or empty

    @property
    def is_over(self) -> bool:
        return bool(self._over)

    def begin(self, epoch: int) -> None:
        """A new epoch; `end` the old one first."""
        self.epoch, self._next, self._checksum, self._over = epoch, 0, first_checksum(epoch), ""

    def end(self, why: str) -> list[Call]:
        """No step of this epoch is released any more. Returns the held calls, by number. The first `why` is remembered."""
        self._over = self._over or why
        held = [early.call for _, early in sorted(self._held.items())]
        self._held.clear()
        return held

    def hold(self, step: Step, packed: bytes, call: Call, now: float) -> None:
        """Put a step in line; Misorder where it has no place there."""
        name = f"stage_{self._stage}: step {step.number} of epoch {step.epoch}"
        if step.epoch != self.epoch:
            raise Misorder("stale", f"{name} came in epoch {self.epoch}", ends_epoch=False)
        if self._over:
            raise Misorder("stale", f"{name} came after the epoch's end: {self._over}", ends_epoch=False)
        if step.number < self._next or step.number in self._held:
            raise Misorder("duplicate", f"{name} came twice")
        if step.number >= self._next + self._window:
            raise Misorder("gap", f"{name} came {step.number - self._next} ahead of step {self._next}; the window is {self._window}")
        self._held[step.number] = _Early(packed, call, now)
        self.reordered += step.number > self._next

    def release(self) -> Call | None:
        """The call of the step whose turn it is, if it is here; Misorder, and it stays in line, where it does not follow
        the one before."""
        early = self._held.get(self._next)
        if early is None:
            return None
        try:
            self._checksum = verify_step(early.packed, self._checksum)
        except Refusal as refusal:
            raise Misorder("checksum", f"stage_{self._stage}: step {self._next} of epoch {self.epoch}: {refusal}") from None
        del self._held[self._next]
        self._next += 1
        return early.call

    def check_gap(self, now: float, limit_s: float) -> None:
        """Misorder where an early step has waited longer than `limit_s` for the one before it."""
        longest = now - min((early.since for early in self._held.values()), default=now)
        if longest > limit_s:
            raise Misorder("gap", f"stage_{self._stage}: step {self._next} of epoch {self.epoch} is missing for {longest:.1f} s")
