"""Which of the ready slots a step takes."""

from __future__ import annotations

import numpy as np

from trireme.engine.slots import Slots


def slots_of(keys: list[int], last_step: list[int]) -> tuple[Slots, np.ndarray]:
    slots = Slots(len(keys))
    slots.planned[:], slots.last_step[:] = np.array(keys) - 1, last_step
    return slots, np.ones(len(keys), bool)


def test_a_step_reads_its_share_of_the_keys():
    slots, decodes = slots_of([9, 2, 5, 1, 4, 3], [6, 6, 6, 6, 7, 7])
    assert slots.deal(np.arange(4), decodes, 3).tolist() == [0, 1, 3]


def test_who_was_left_is_not_left_again():
    slots, decodes = slots_of([5, 9, 2, 9, 4, 3], [5, 6, 6, 6, 7, 7])
    assert slots.deal(np.arange(4), decodes, 3).tolist() == [0, 2, 3]


def test_where_all_may_go_all_do():
    slots, decodes = slots_of([9, 2, 5], [-1, -1, -1])
    assert slots.deal(np.arange(3), decodes, 3).tolist() == [0, 1, 2]
    assert slots.deal(np.arange(0), decodes, 3).tolist() == []


def test_the_first_of_two_steps_takes_half_of_the_keys():
    slots, decodes = slots_of(list(range(1, 101)), [-1] * 100)
    taken = slots.deal(np.arange(100), decodes, 50)
    assert len(taken) == 50 and abs((taken + 1).sum() - 2525) < 50


def test_a_step_that_would_read_too_much_leaves_one():
    slots, decodes = slots_of([30, 30, 3, 3, 3, 3, 3, 3], [6, 6, 6, 6, 7, 7, 7, 7])
    assert slots.deal(np.arange(4), decodes, 4).tolist() == [1, 2, 3]
    slots.planned[:] = [9, 9, 9, 9, 8, 8, 8, 8]
    assert slots.deal(np.arange(4), decodes, 4).tolist() == [0, 1, 2, 3], "without one it would read too little"


def test_one_that_is_ready_alone_is_not_left():
    slots, decodes = slots_of([1000, 10, 10, 10], [5, 6, 7, 8])
    assert slots.deal(np.arange(1), decodes, 1).tolist() == [0]
