"""Maps of experts as a leader knows them: in force from the first step that is stamped with them, dropped with the epoch otherwise;
and whatever ranks die, all of a stage have the same."""

from __future__ import annotations

import time

import numpy as np
import pytest

from ranks import fake_rank
from trireme.core.control import Fault, Join, Joined, Offer, Prepare, Push, Status, pack_ask
from trireme.core.step import Outcome, array, ints
from trireme.ranks.maps import StageMaps

FIRST, SECOND = ints([1, 0]), ints([0, 1])


def test_an_offer_waits_for_a_computed_step_and_is_in_force_once_stamped():
    maps = StageMaps({1: np.array([1, 0], np.int32)})
    maps.begin()
    maps.offer(Offer(1, {0: FIRST}))
    assert maps.order(3) is None, "no rank has computed a step of this epoch"
    maps.computed(0)
    prepare = maps.order(3)
    assert prepare is not None and prepare == Prepare(3, 1, {0: FIRST})
    assert maps.order(3) is None, "ordered already"
    maps.offer(Offer(1, {0: FIRST}))  # the same again
    assert maps.stamp(1) and maps.version == maps.ready == 0, "not ready"
    maps.prepared(prepare, 7)
    assert (maps.ready, maps.version) == (1, 0)
    assert not maps.stamp(0) and maps.version == 0
    assert not maps.stamp(1) and maps.version == 1 and not maps.settled
    assert {layer: map.tolist() for layer, map in maps.maps.items()} == {0: [1, 0], 1: [1, 0]}
    maps.offer(Offer(2, {1: SECOND}))
    maps.computed(0)  # of a step before it
    assert maps.order(3) is None
    maps.computed(1, 0.25)
    assert maps.order(3) == Prepare(3, 2, {1: SECOND})
    told = maps.push(0, 9, 1, np.array([[5, 6]]), 4)
    assert (told.moved_bytes, told.stalled_s, told.fault, told.num_steps) == (7, 0.25, "", 4)
    assert maps.push(0, 9, 1, np.array([[5, 6]]), 4).moved_bytes == 0


def test_what_is_dropped_is_told_and_a_late_answer_to_it_counts_for_nothing():
    maps = StageMaps({})
    maps.computed(0)
    maps.offer(Offer(1, {0: FIRST}))
    prepare = maps.order(1)
    assert prepare is not None
    maps.drop("a rank died")
    maps.prepared(prepare, 7)
    assert maps.ready == 0 and maps.stamp(1)
    assert maps.push(0, 1, 0, np.zeros((1, 2)), 1).fault == "maps of version 1 were dropped: a rank died"
    maps.drop("again")
    assert maps.push(0, 1, 0, np.zeros((1, 2)), 1).fault == ""
    maps.offer(Offer(1, {0: SECOND}))  # another of the same number
    again = maps.order(1)
    assert again is not None and again.maps == {0: SECOND}
    maps.failed(prepare, "late")
    assert not maps.fault
    maps.failed(again, "spoilt")
    assert "spoilt" in maps.fault


@pytest.fixture
def stage(lead):
    """A leader of two ranks that has joined, and what it pushes."""
    pushes: list[Push] = []
    front = lead(tensor_parallel_size=2, async_depth=3, eplb={}, push=pushes.append)
    front.await_state("ready")
    front.join()
    return front, pushes


def post(front, *firsts: int, **also) -> list:
    """Answers to the first steps of an epoch."""
    for step in front.steps(*firsts, **also):
        front.post(step)
    return [front.take() for _ in firsts]


def run_to_ready(front, version: int) -> list[int]:
    """Steps, one by one, until one says that `version` is ready. -> their stamps"""
    stamps = [0]
    deadline = time.monotonic() + 10
    while True:
        steps = front.steps(*range(len(stamps)), maps=[[stamp] for stamp in stamps])
        front.post(steps[-1])
        outcome = front.take()
        assert isinstance(outcome, Outcome) and time.monotonic() < deadline, outcome
        if outcome.map_ready == version:
            return stamps
        stamps.append(0)
        time.sleep(0.01)


@pytest.mark.ranks
def test_loads_are_summed_and_go_to_the_service_only(stage):
    front, pushes = stage
    answers = post(front, 1, 2, 3, counts_loads=[False, True, True])
    assert [answer.loads for answer in answers] == [b""] * 3
    assert [(push.number, array(push.loads).tolist(), push.num_steps) for push in pushes] == [(1, [3, 4], 2), (2, [3, 4], 1)]
    front.join()
    front.leader.prepare(Offer(1, {0: FIRST}))
    stamps = run_to_ready(front, 1)
    steps = front.steps(*range(len(stamps) + 1), maps=[*([stamp] for stamp in stamps), [1]], counts_loads=[False] * len(stamps) + [True])
    front.post(steps[-1])
    assert front.take().map_ready == 1
    assert (pushes[-1].version, pushes[-1].moved_bytes, pushes[-1].stalled_s) == (1, 100 + 101, 0.5)


@pytest.mark.ranks
def test_maps_in_force_outlive_a_death_and_those_only_ready_do_not(stage):
    front, pushes = stage
    front.leader.prepare(Offer(1, {0: FIRST}))
    stamps = run_to_ready(front, 1)
    # rank 0 dies of the step that is stamped, and rank 1 may not have seen it
    front.post(front.steps(*range(len(stamps)), fake_rank.EXIT, maps=[*([stamp] for stamp in stamps), [1]])[-1])
    assert front.take().kind == "rank"
    assert front.await_state("ready", restarts=2).map_version == 1
    front.epoch += 1
    assert front.ask(Join(front.epoch)) == Joined(front.epoch, 1)

    front.leader.prepare(Offer(2, {0: SECOND}))
    stamps = run_to_ready(front, 2)
    front.post(front.steps(*range(len(stamps)), fake_rank.EXIT, maps=[[stamp] for stamp in [*stamps, 1]])[-1])
    assert front.take().kind == "rank"
    front.await_state("ready", restarts=4)
    front.epoch += 1
    assert front.ask(Join(front.epoch)) == Joined(front.epoch, 1)
    post(front, 1, counts_loads=[True])
    assert "maps of version 2 were dropped: stage_0 rank" in pushes[-1].fault and pushes[-1].version == 1


@pytest.mark.ranks
def test_a_rank_that_cannot_prepare_ends_nothing(stage):
    front, pushes = stage
    front.leader.prepare(Offer(1, {fake_rank.SPOILT: FIRST}))
    answers = [front.take() for step in front.steps(1) if not front.post(step)]
    time.sleep(0.2)
    front.post(front.steps(1, 2, counts_loads=[False, True])[1])
    answers.append(front.take())
    assert [type(answer) for answer in answers] == [Outcome] * 2
    assert "expert 3 of layer 13 came spoilt" in pushes[-1].fault
    assert (answers[-1].map_ready, front.ask(Status()).map_version) == (0, 0)


@pytest.mark.ranks
def test_maps_that_are_stamped_and_not_ready_are_a_fault_of_the_epoch(stage):
    front, _ = stage
    answers = post(front, 1, 2, 3, maps=[[0], [7], [7]])
    assert [getattr(answer, "kind", "") for answer in answers] in (["", "map", "stale"], ["map", "", "stale"], ["map", "stale", ""])
    front.join()
    assert isinstance(post(front, 1)[0], Outcome)


@pytest.mark.ranks
def test_maps_do_not_come_from_the_front(stage):
    front, _ = stage
    front.post(pack_ask(Prepare(front.epoch, 1, {0: FIRST})))
    answer = front.take()
    assert isinstance(answer, Fault) and answer.kind == "map"
    assert isinstance(post(front, 1)[0], Outcome)
