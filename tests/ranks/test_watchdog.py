"""A device that is stuck is named once, with the step that it is stuck in; one that goes on is left alone. A process that cannot be
freed ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from trireme.core.step import Step, ints
from trireme.ranks.runner import Pending
from trireme.ranks.watchdog import Late, Watchdog

LIMIT_S = 0.2


def late(number: int) -> Late:
    nothing = ints([])
    step = Step(1, number, nothing, nothing, nothing, nothing, nothing)
    return Late(10 + number, step, Pending(True, pytest.fail, lambda: f"at {number}"))


def test_a_stuck_step_is_told_once_and_the_next_has_its_own_time():
    told: list[tuple[int, str]] = []
    heard = threading.Semaphore(0)

    def stuck(each: Late) -> None:
        told.append((each.ticket, each.pending.where()))
        heard.release()

    with Watchdog(LIMIT_S, stuck) as watchdog:
        for number in (0, 1):
            watchdog.watch(late(number))
        began = time.monotonic()
        assert heard.acquire(timeout=10) and time.monotonic() - began > LIMIT_S
        assert told == [(10, "at 0")]
        time.sleep(2 * LIMIT_S)
        assert told == [(10, "at 0")]
        assert watchdog.oldest.ticket == 10
        watchdog.passed()
        assert heard.acquire(timeout=10)
        assert told == [(10, "at 0"), (11, "at 1")]
        watchdog.passed()


def test_steps_that_pass_are_left_alone():
    told: list[Late] = []
    with Watchdog(LIMIT_S, told.append) as watchdog:
        watchdog.watch(late(0))
        for number in range(1, 12):
            watchdog.watch(late(number))
            time.sleep(LIMIT_S / 8)
            watchdog.passed()
        watchdog.passed()
        time.sleep(2 * LIMIT_S)
    assert not told


@pytest.mark.parametrize(("takes_s", "code", "said"), [(0.0, 0, "freed"), (60.0, 1, "stuck")])
def test_what_is_never_through_ends_the_process(takes_s, code, said):
    script = f"""
import time
from trireme.ranks.watchdog import or_end
with or_end(1.0, lambda: print("stuck", flush=True)):
    time.sleep({takes_s})
print("freed")
time.sleep(1.5 if {takes_s} == 0 else 0)
"""
    known = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50, env=known)
    assert (ended.returncode, ended.stdout.strip()) == (code, said), ended.stderr
