"""BlsStages with a made-up server: every call ends once, lost threads are replaced, dead stages are loaded again."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from trireme.core.control import Parcel
from trireme.serve.bls import BlsCalls, BlsStages

DEAD = RuntimeError(
    "Failed to process the request(s) for model instance 'stage_0_0_0', message: Stub process 'stage_0_0_0' is not healthy."
)


class Server:
    """Echoes; a model in `hung` never answers, one in `dead` fails."""

    def __init__(self):
        self.hung: dict[str, threading.Event] = {}
        self.dead: set[str] = set()
        self.loaded: list[str] = []

    def call(self, model: str, parcel: Parcel) -> Parcel:
        if model in self.hung:
            self.hung[model].wait()
        if model in self.dead:
            raise DEAD
        return Parcel(model.encode() + parcel.packed)

    def reload(self, model: str) -> None:
        self.dead.discard(model)
        self.loaded.append(model)


@pytest.fixture
def server():
    return Server()


@pytest.fixture
def stages(server):
    stages = BlsStages(2, ["stage_0", "stage_1"], server.call, server.reload, num_threads=2, thread_pool=32)
    stages.start()
    yield stages
    for event in server.hung.values():
        event.set()
    stages.stop()


def post(stages, stage, packed=b"x", timeout_s=5.0) -> queue.Queue:
    answers: queue.Queue = queue.Queue()
    stages.post(stage, Parcel(packed), timeout_s, answers.put)
    return answers


def test_answers(stages):
    assert [post(stages, k, b"!").get(timeout=5).packed for k in (0, 1, 0)] == [b"stage_0!", b"stage_1!", b"stage_0!"]


def test_lost_threads_are_counted_and_replaced(server, stages):
    server.hung["stage_0"] = threading.Event()
    lost = [post(stages, 0, timeout_s=0.1) for _ in range(4)]  # more than there are threads
    assert all(isinstance(answers.get(timeout=5), TimeoutError) for answers in lost)
    assert 2 <= stages.num_abandoned <= 4  # the other two had no thread, or a spare one
    assert post(stages, 1).get(timeout=5).packed == b"stage_1x"
    server.hung.pop("stage_0").set()
    deadline = time.monotonic() + 5
    while stages.num_abandoned and time.monotonic() < deadline:
        time.sleep(0.01)
    assert stages.num_abandoned == 0 and all(answers.empty() for answers in lost)


def test_a_dead_stage_is_loaded_again_and_its_stranded_calls_end(server, stages):
    server.hung["stage_0"] = threading.Event()
    stranded = post(stages, 0, timeout_s=60)
    while not stages._queue.empty():
        time.sleep(0.01)
    del server.hung["stage_0"]
    server.dead.add("stage_0")
    assert "not healthy" in str(post(stages, 0).get(timeout=5))
    assert "not healthy" in str(stranded.get(timeout=5))
    deadline = time.monotonic() + 5
    while not server.loaded and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.loaded == ["stage_0"] and stages.num_reloads == 1
    assert post(stages, 0).get(timeout=5).packed == b"stage_0x"


def test_an_old_error_does_not_unload_a_healed_stage(server, stages):
    slow = server.hung["stage_0"] = threading.Event()
    server.dead.add("stage_0")
    late = post(stages, 0)
    stages._loaded_at[0] = time.monotonic()  # it is loaded while the call is under way
    slow.set()
    assert "not healthy" in str(late.get(timeout=5))
    time.sleep(0.1)
    assert server.loaded == []


def test_a_slow_stage_is_left_alone(server, stages):
    stages.heal(0, TimeoutError("stage_0 did not answer in time"))
    time.sleep(0.1)
    assert not server.loaded


def test_a_server_that_cannot_load(server):
    stages = BlsStages(1, ["stage_0"], server.call, None, num_threads=1, thread_pool=32)
    stages.start()
    stages.heal(0, RuntimeError("Request for unknown model: 'stage_0' is not found"))
    stages.stop()
    assert stages.num_reloads == 0


def test_stop_ends_open_calls(server, stages):
    server.hung["stage_0"] = threading.Event()
    answers = post(stages, 0, timeout_s=60)
    stages.stop()
    assert isinstance(answers.get(timeout=5), ConnectionError)


def test_after_a_stop_nothing_is_called(server, stages):
    """The server has taken its threads away by then, and a call that none of them takes crashes it."""
    stages.stop()
    server.hung["stage_0"] = threading.Event()  # a call would wait
    assert isinstance(post(stages, 0).get(timeout=5), ConnectionError)
    stages.heal(0, RuntimeError("Request for unknown model: 'stage_0' is not found"))
    assert not server.loaded


def test_a_stop_before_the_start():
    """A model may be unloaded before its first call."""
    BlsStages(1, ["stage_0"], Server().call, None, num_threads=1, thread_pool=32).stop()


def test_calls_to_a_model_that_another_heals(server):
    """As a stage's to `eplb`: an answer, an error, or the end of the time; never longer."""
    calls = BlsCalls(["eplb"], server.call, num_threads=1)
    calls.start()
    assert calls.ask(0, Parcel(b"x"), 5.0).packed == b"eplbx"
    server.dead.add("eplb")
    with pytest.raises(RuntimeError, match="not healthy"):
        calls.ask(0, Parcel(b"x"), 5.0)
    server.dead.clear()
    held = server.hung["eplb"] = threading.Event()
    with pytest.raises(TimeoutError, match="eplb did not answer in time"):
        calls.ask(0, Parcel(b"x"), 0.1)
    del server.hung["eplb"]
    assert calls.ask(0, Parcel(b"y"), 5.0).packed == b"eplby" and calls.num_abandoned == 1
    assert not server.loaded
    held.set()
    calls.stop()
    with pytest.raises(ConnectionError, match="stopping"):
        calls.ask(0, Parcel(b"z"), 5.0)
