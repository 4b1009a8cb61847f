"""The leader with fake ranks: order, faults by name, deaths, and exactly one answer for each post."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from ranks import fake_rank
from trireme.core.control import Found, Founded, Join, Status
from trireme.core.step import Outcome, array, ints
from trireme.ranks import rank

pytestmark = pytest.mark.ranks


def numbers(front, count: int) -> list:
    return [(type(answer).__name__, answer.number) for answer in (front.take() for _ in range(count))]


def kinds(front, count: int) -> list[str]:
    return [answer.kind for answer in (front.take() for _ in range(count))]


def test_steps_are_answered_by_number_whatever_their_arrival(lead):
    front = lead(pipeline_parallel_size=2, async_depth=2)
    state = front.await_state("ready")
    assert (state.num_pages, state.epoch, state.restarts) == (11, -1, 0)
    front.join()
    steps = front.steps(*range(40))
    shuffled = [number for start in range(0, 40, 4) for number in random.Random(start).sample(range(start, start + 4), 4)]
    threads = [threading.Thread(target=front.post, args=(steps[number],)) for number in shuffled[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()  # else one that the machine forgets for a while would be more than the window behind
    for number in shuffled[4:]:
        front.post(steps[number])
        if number % 4 == 3:
            time.sleep(0.01)
    assert numbers(front, 40) == [("Outcome", number) for number in range(40)]
    assert front.ask(Status()).reordered > 0


@pytest.mark.parametrize(("stage", "num_snapshots"), [(0, 6), (1, None)])
def test_a_stage_holds_as_much_as_its_fullest_rank(lead, stage, num_snapshots):
    state = lead(stage=stage, pipeline_parallel_size=2, tensor_parallel_size=2).await_state("ready")
    assert (state.num_pages, state.num_snapshots) == (11, num_snapshots)


def test_rows_that_several_ranks_routed_are_put_together(lead):
    front = lead(tensor_parallel_size=2)
    front.await_state("ready")
    front.join()
    for step in front.steps(1, 2, routed=[b"", ints([0])]):
        front.post(step)
    answers = [front.take(), front.take()]
    assert [np.frombuffer(answer.routed_experts, np.int16).tolist() for answer in answers] == [[], [7, 5]]


def test_deviations_are_faults_by_name_and_end_the_epoch(lead):
    front = lead(pipeline_parallel_size=2, step_timeout_s=0.5)
    front.await_state("ready")
    assert front.ask(Found(5)) == Founded(5, "broken:0")

    front.post(front.steps(1)[0])
    assert kinds(front, 1) == ["stale"]  # no epoch yet
    front.join()
    steps = front.steps(1, 2, 3, 4, 5)
    front.post(steps[0])
    assert array(front.take().tokens).tolist() == [1]
    front.post(steps[2])
    front.post(steps[0])
    assert kinds(front, 2) == ["duplicate", "stale"]  # the held one goes with the epoch
    front.post(steps[1])
    assert kinds(front, 1) == ["stale"]
    assert front.ask(Found(5)).store != "broken:0"  # its ranks were told

    front.join()
    altered = bytearray(front.steps(1)[0])
    altered[-1] ^= 1
    front.post(bytes(altered))
    assert kinds(front, 1) == ["checksum"]

    front.join()
    front.post(front.steps(1, 2)[1])
    assert kinds(front, 1) == ["gap"]  # after step_timeout_s

    front.join()
    front.post(front.steps(1, 2, 3, 4)[3])
    assert kinds(front, 1) == ["gap"]  # beyond the window

    front.post(b"S\x00\x00\x00\x00nonsense")
    assert kinds(front, 1) == ["checksum"]
    assert front.ask(Join(1)).kind == "stale"
    front.join()
    front.post(front.steps(7)[0])
    assert isinstance(front.take(), Outcome)


def test_a_rank_that_could_not_keeps_its_life_but_ends_the_epoch(lead):
    front = lead()
    pid = front.await_state("ready").ranks[0].pid
    front.join()
    steps = front.steps(1, fake_rank.FAIL, 3)
    front.post(steps[0])
    front.post(steps[1])
    assert isinstance(front.take(), Outcome)
    assert kinds(front, 1) == ["rank"]
    front.post(steps[2])
    assert kinds(front, 1) == ["stale"]
    front.join()
    front.post(front.steps(1)[0])
    assert isinstance(front.take(), Outcome)
    assert front.ask(Status()).ranks[0].pid == pid


@pytest.mark.parametrize("deed", [fake_rank.EXIT, fake_rank.HANG, fake_rank.FREEZE], ids=["exit", "hang", "freeze"])
def test_a_dead_late_or_mute_rank_is_started_again(lead, monkeypatch, deed):
    monkeypatch.setattr(rank, "MUTE_S", 2.0)
    front = lead(step_timeout_s=0.5 if deed == fake_rank.HANG else 60.0, async_depth=2)
    front.await_state("ready")
    front.join()
    for step in front.steps(deed, 2, 3):
        front.post(step)
    assert kinds(front, 3) == ["rank"] * 3
    state = front.await_state("ready")
    assert (state.restarts, state.epoch) == (1, 1)
    front.join()
    front.post(front.steps(4)[0])
    assert isinstance(front.take(), Outcome)


def test_a_rank_is_started_again_where_the_run_folder_is_gone(lead, run_dir):
    """It is empty while all is well: whoever tidies /tmp removes it, and so does the other stage of a server when it is unloaded."""
    front = lead()
    pid = front.await_state("ready").ranks[0].pid
    run_dir.rmdir()
    os.kill(pid, signal.SIGKILL)
    front.await_state("ready", restarts=1)


def test_a_rank_that_cannot_load_says_so_for_ever(lead):
    front = lead("refuse")
    front.post(front.steps(1)[0])
    assert front.take().kind == "unready"
    state = front.await_state("failed")
    assert state.detail == "stage_0 rank 0 weights of layer 3 are missing"
    time.sleep(0.3)
    assert front.ask(Status()) == state
    assert front.ask(Join(1)).message == state.detail


def test_a_rank_that_never_gets_ready_is_given_up(lead, monkeypatch):
    monkeypatch.setattr(rank, "_FIRST_DELAY_S", 0.01)
    front = lead("crash")
    state = front.await_state("failed")
    assert "exit code 7, 5 times in a row before it was ready" in state.detail


def test_rows_travel_both_ways(lead):
    front = lead()
    front.await_state("ready")
    front.join()
    rows = np.arange(100_000, dtype=np.uint8)
    front.post(front.steps(fake_rank.CARRY)[0], rows)
    assert isinstance(front.take(), Outcome)
    assert np.array_equal(front.rows[-1], rows)


def test_stop_answers_everything_once(lead):
    front = lead(pipeline_parallel_size=2, async_depth=2)
    front.await_state("ready")
    front.join()
    steps = front.steps(fake_rank.HANG, 2, 3, 4)
    for number in (0, 1, 3):
        front.post(steps[number])
    front.leader.stop()
    assert kinds(front, 3) == ["unready"] * 3
    front.post(steps[2])
    assert kinds(front, 1) == ["unready"]
    assert front.answers.empty()


ORPHAN = """
import sys, time
from pathlib import Path
from trireme.core.settings import make_settings
from trireme.ranks import launch, pool
from trireme.ranks.leader import Leader
leader = Leader(make_settings({{"model": "echo"}}), 0, Path(sys.argv[1]), {launcher}("ranks.fake_rank"))
leader.start()
while leader.state().state != "ready":
    time.sleep(0.02)
print(leader.state().ranks[0].pid, flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("launcher", ["launch.LocalLauncher", "pool.RankPool"])
def test_a_killed_leader_leaves_neither_rank_nor_socket(run_dir, fake_ranks, launcher):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.environ["PYTHONPATH"]])}
    command = [sys.executable, "-c", ORPHAN.format(launcher=launcher), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        pid = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:  # a container may have nobody to reap it
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not list(run_dir.iterdir())
