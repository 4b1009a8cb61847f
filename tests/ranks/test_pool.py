"""The pool with fake ranks: one process lives as rank after rank and grows by nothing; what is stuck or dead is replaced."""

import os
import signal
import time
from contextlib import closing

import psutil
import pytest

from ranks import fake_rank
from trireme.core.control import Status
from trireme.core.step import Outcome, array
from trireme.ranks.pool import RankPool

pytestmark = pytest.mark.ranks


def pid(front) -> int:
    return front.await_state("ready").ranks[0].pid


def echo(front, first: int) -> None:
    """A step goes through."""
    front.join()
    front.post(front.steps(first)[0])
    answer = front.take()
    assert isinstance(answer, Outcome)
    assert array(answer.tokens).tolist() == [first]


def test_thirty_lives_of_one_process(lead, pool):
    pids, sizes = set(), set()
    for life in range(30):
        front = lead(launcher=pool)
        worker = psutil.Process(pid(front))
        echo(front, life)
        pids.add(worker.pid)
        sizes.add((worker.num_fds(), worker.num_threads(), psutil.Process().num_fds()))
        front.leader.stop()
    assert len(pids) == 1
    assert len(sizes) == 1, "file descriptors or threads of past lives were left"


def test_a_worker_is_one_rank_at_a_time(lead, pool):
    fronts = [lead(stage=stage, launcher=pool) for stage in range(3)]
    pids = [pid(front) for front in fronts]
    assert len(set(pids)) == 3
    fronts[1].leader.stop()
    echo(fronts[0], 5)
    assert pid(lead(stage=1, launcher=pool)) == pids[1]
    echo(fronts[2], 6)


def test_a_refusal_ends_a_life_and_no_process(lead, pool):
    first = lead(launcher=pool)
    before = pid(first)
    first.leader.stop()
    refused = lead("refuse", launcher=pool)
    assert refused.await_state("failed").detail == "stage_0 rank 0 weights of layer 3 are missing"
    assert pid(lead(launcher=pool)) == before


@pytest.mark.parametrize("deed", [fake_rank.HANG, fake_rank.FREEZE], ids=["hang", "freeze"])
def test_a_rank_that_cannot_leave_is_killed_after_a_grace(lead, pool, deed):
    front = lead(launcher=pool)
    stuck = pid(front)
    front.join()
    front.post(front.steps(deed)[0])
    time.sleep(0.1)
    began = time.monotonic()
    front.leader.stop()
    assert time.monotonic() - began < 4
    assert not psutil.pid_exists(stuck)
    again = lead(launcher=pool)
    assert pid(again) != stuck
    echo(again, 7)


def test_a_killed_worker_is_replaced_at_work_and_at_rest(lead, pool):
    front = lead(launcher=pool)
    first = pid(front)
    os.kill(first, signal.SIGKILL)
    while front.ask(Status()).restarts == 0:
        time.sleep(0.02)
    second = pid(front)
    assert second != first
    echo(front, 8)
    front.leader.stop()
    os.kill(second, signal.SIGKILL)
    os.waitid(os.P_PID, second, os.WEXITED | os.WNOWAIT)
    third = pid(lead(launcher=pool))
    assert third not in (first, second)


def test_close_ends_all(lead, fake_ranks):
    with closing(RankPool(fake_ranks)) as pool:
        fronts = [lead(stage=stage, launcher=pool) for stage in range(2)]
        pids = [pid(front) for front in fronts]
        for front in fronts:
            front.leader.stop()
        assert all(map(psutil.pid_exists, pids))
    assert not any(map(psutil.pid_exists, pids))
