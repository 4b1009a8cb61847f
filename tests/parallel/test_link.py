"""Links between stages: rows and tokens arrive as sent, and a peer's end is seen at once, by whatever end."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from trireme.core.settings import make_settings
from trireme.parallel.collectives import Collectives
from trireme.parallel.comm import LinkLost, StoreHost, make_unless, meet, reach_store
from trireme.parallel.link import SoloLink, TensorLink, form_link
from trireme.parallel.mesh import Mesh
from trireme.parallel.plan import Plan

HIDDEN = 8


def settings(pp: int, **more):
    return make_settings({"model": "none", "pipeline_parallel_size": pp, **more})


def form(settings, stage: int, epoch: int, store: str, dtype=torch.float32, give_up=lambda: False):
    alone = Collectives(Mesh(Plan(layer_cut=(1,) * settings.num_stages)), 0)
    return form_link(settings, alone, stage, epoch, store, hidden=HIDDEN, dtype=dtype, give_up=give_up)


def form_all(settings, epoch: int, store: str, dtype=torch.float32) -> list:
    """All stages' links, in threads: groups need no process of their own."""
    with ThreadPoolExecutor(settings.num_stages) as pool:
        return list(pool.map(lambda stage: form(settings, stage, epoch, store, dtype), range(settings.num_stages)))


@pytest.fixture(scope="module")
def store():
    hosted = StoreHost(10.0)
    yield hosted.address


epochs = iter(range(1, 1000))


@pytest.mark.parametrize("pp", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form_of", ["collective", "tensor"])
def test_rows_pass_all_stages(store, pp, dtype, form_of):
    links = form_all(settings(pp, link=form_of), next(epochs), store, dtype)
    for num_rows in (1, 5, 300):
        rows, carried = torch.randn(num_rows, HIDDEN).to(dtype), None
        assert links[0].receive(num_rows, None) is None
        passed = rows
        for stage in range(pp - 1):
            carried = links[stage].send(passed)
            assert (carried is None) == (form_of == "collective")
            passed = links[stage + 1].receive(num_rows, carried)
        assert torch.equal(passed, rows)


def test_tokens_come_back_in_step_order_and_many_sends_are_reaped(store):
    links = form_all(settings(2), next(epochs), store)
    expected = []
    for number in range(40):
        expected.append(links[0].expect_tokens(2))
        links[0].send(torch.full((1, HIDDEN), float(number)))
        assert links[1].receive(1, None)[0, 0] == number
        links[1].send_tokens(torch.tensor([number, -number], dtype=torch.int32))
    assert [one.wait().tolist() for one in expected] == [[number, -number] for number in range(40)]


def test_one_stage_needs_no_way():
    link = form(settings(1), 0, 0, "")
    assert isinstance(link, SoloLink)
    first, second = link.expect_tokens(1), link.expect_tokens(1)
    link.send_tokens(torch.tensor([1]))
    link.send_tokens(torch.tensor([2]))
    assert (first.wait().item(), second.wait().item()) == (1, 2)


def test_tensor_link_refuses_rows_of_another_size():
    link = TensorLink(1, 0, hidden=HIDDEN, dtype=torch.float32)
    with pytest.raises(LinkLost, match="needs 64 bytes of rows with the call, and none came"):
        link.receive(2, None)
    with pytest.raises(LinkLost, match="and 63 bytes came"):
        link.receive(2, np.zeros(63, np.uint8))


def test_dropping_a_link_frees_the_other_end(store):
    links = form_all(settings(2), next(epochs), store)
    links[0].expect_tokens(1)  # a work in flight is dropped as well
    with ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(links.pop().receive, 1, None)
        time.sleep(0.2)
        assert not blocked.done()
        links.clear()
        with pytest.raises(LinkLost, match=r"edge_0\.0 of epoch"):
            blocked.result(timeout=5)


def test_a_late_peer_is_a_lost_link(store):
    links = form_all(settings(2, step_timeout_s=0.3), next(epochs), store)
    with pytest.raises(LinkLost):
        links[1].receive(1, None)


def test_meeting_names_who_is_missing_and_can_be_given_up(store):
    meeting, epoch = reach_store(store, 5.0), next(epochs)
    with pytest.raises(LinkLost, match=r"ranks \[0, 2\] did not come"):
        meet(meeting, epoch, 1, 3, timeout_s=0.1, give_up=lambda: False)
    give_up = threading.Event()
    threading.Timer(0.1, give_up.set).start()
    with pytest.raises(LinkLost, match="given up"):
        form(settings(2), 0, next(epochs), store, give_up=give_up.is_set)
    with pytest.raises(LinkLost, match="store"):
        reach_store("127.0.0.1:1", 0.5)


def test_one_that_came_and_died_holds_up_nobody(store):
    """It took its seat and forms nothing; the others are told before their time limit."""
    epoch, give_up = next(epochs), threading.Event()
    reach_store(store, 5.0).set(f"{epoch}/seat/1", "taken")
    threading.Timer(0.2, give_up.set).start()
    began = time.monotonic()
    with pytest.raises(LinkLost, match="given up"):
        form(settings(2, step_timeout_s=8.0), 0, epoch, store, give_up=give_up.is_set)
    assert time.monotonic() - began < 4


def _stage_1(address: str, epochs: list[int]) -> None:
    for epoch in epochs:
        link = form(settings(2), 1, epoch, address)
        link.send_tokens(link.receive(1, None)[0, :1].to(torch.int32))
        del link
        time.sleep(0.1)
    time.sleep(100)


@pytest.mark.ranks
def test_a_killed_peer_is_seen_at_once_and_a_new_one_joins_a_new_epoch(store):
    context = multiprocessing.get_context("spawn")
    first, second, third = next(epochs), next(epochs), next(epochs)
    peer = context.Process(target=_stage_1, args=(store, [first, second]), daemon=True)
    peer.start()
    for epoch in (first, second):  # both processes live through a change of epoch
        link = form(settings(2), 0, epoch, store)
        tokens = link.expect_tokens(1)
        link.send(torch.full((1, HIDDEN), float(epoch)))
        assert tokens.wait().item() == epoch
        lost = link.expect_tokens(1)
        if epoch == second:
            os.kill(peer.pid, signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(LinkLost):
            lost.wait()
        assert time.monotonic() - began < 5
    peer.join()
    links = form_all(settings(2), third, store)
    links[0].send(torch.ones(1, HIDDEN))
    assert links[1].receive(1, None).sum() == HIDDEN


def test_what_is_given_up_hears_of_it_and_asks_no_other_threads_channel():
    asked, heard = set(), threading.Event()

    def give_up() -> bool:
        asked.add(threading.get_ident())
        return True

    def make(given_up) -> None:
        while not given_up():
            time.sleep(0.001)
        heard.set()

    with pytest.raises(LinkLost, match="given up"):
        make_unless(give_up, make)
    assert heard.wait(10) and asked == {threading.get_ident()}
