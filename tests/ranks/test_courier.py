"""Courier: pushes reach the service in their order, those that wait as one; nobody waits for a service that is slow or dead."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

from trireme.core.control import Offer, Push
from trireme.core.step import array, ints
from trireme.ranks.courier import Courier


def push(number: int, **given) -> Push:
    return Push(0, number, 7, ints([number, 1]), **given)


def test_pushes_that_wait_go_as_one():
    asked: SimpleQueue[Push] = SimpleQueue()
    held = threading.Event()

    def ask(pushed: Push) -> Offer:
        asked.put(pushed)
        held.wait(10)
        return Offer(pushed.version + 1, {0: b""})

    courier, offers = Courier("stage_0", ask), SimpleQueue()
    courier.start(offers.put)
    courier.push(push(1))
    assert asked.get(timeout=10).number == 1
    courier.push(push(2, num_steps=3, moved_bytes=10, fault="one died"))
    courier.push(push(3, num_steps=4, moved_bytes=5, stalled_s=0.5))
    held.set()
    both = asked.get(timeout=10)
    assert (both.number, both.num_steps, both.moved_bytes, both.stalled_s, both.fault) == (3, 7, 15, 0.5, "one died")
    assert array(both.loads).tolist() == [5, 2]
    assert [offers.get(timeout=10).version for _ in range(2)] == [8, 8]
    courier.stop()


def test_the_wish_for_rows_is_told_once_and_ends_with_the_service():
    answers, offers = (
        iter([Offer(records=True), Offer(records=True), ConnectionError("not healthy"), ConnectionError("gone")]),
        SimpleQueue(),
    )
    left = threading.Semaphore(0)

    def ask(_: Push) -> Offer:
        left.release()
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    courier = Courier("stage_0", ask)
    courier.start(offers.put)
    for number in range(4):
        courier.push(push(number))
        assert left.acquire(timeout=10)
    courier.stop()
    assert [offers.get(timeout=10).records for _ in range(2)] == [True, False] and offers.empty()


def test_a_dead_service_is_asked_again():
    answers, offers = iter([ConnectionError("not healthy"), Offer(), Offer(8, {0: b""})]), SimpleQueue()
    left = threading.Semaphore(0)

    def ask(_: Push) -> Offer:
        answer = next(answers)
        left.release()
        if isinstance(answer, Exception):
            raise answer
        return answer

    courier = Courier("stage_0", ask)
    courier.start(offers.put)
    for number in range(3):
        courier.push(push(number))
        assert left.acquire(timeout=10)
    assert offers.get(timeout=10).version == 8 and offers.empty()
    began = time.monotonic()
    courier.stop()
    assert time.monotonic() - began < 5
