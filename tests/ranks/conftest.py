"""Leaders with fake ranks, alone or of a pool, and a check that they leave nothing behind."""

import os
import queue
import shutil
import tempfile
import time
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from trireme.core.control import Join, Joined, Parcel, Status, open_answer, pack_ask, seal_step
from trireme.core.settings import make_settings
from trireme.core.step import Step, first_checksum, ints, pack_step
from trireme.ranks.launch import Launcher, LocalLauncher
from trireme.ranks.leader import Leader
from trireme.ranks.pool import RankPool


@pytest.fixture
def run_dir():
    folder = Path(tempfile.mkdtemp(prefix="trireme-test-", dir="/tmp"))  # pytest's own are too long for sockets
    yield folder
    assert not list(folder.iterdir()), "sockets were left"
    shutil.rmtree(folder)


class Front:
    """Posts to one leader as a front would, and keeps the answers in the order they came."""

    def __init__(self, leader: Leader):
        self.leader = leader
        self.answers: queue.Queue = queue.Queue()
        self.rows: list = []
        self.epoch = 0

    def post(self, packed: bytes, rows=None) -> None:
        self.leader.post(Parcel(packed, rows), self._done)

    def _done(self, parcel: Parcel) -> None:
        self.rows.append(parcel.rows)
        self.answers.put(open_answer(parcel.packed))

    def ask(self, ask):
        self.post(pack_ask(ask))
        return self.take()

    def take(self, timeout: float = 20.0):
        return self.answers.get(timeout=timeout)

    def await_state(self, state: str, timeout: float = 20.0, *, restarts: int = 0):
        """`restarts`: deaths of ranks that are known by then; ranks that die together need not be found dead together."""
        deadline = time.monotonic() + timeout
        while (found := self.ask(Status())).state != state or found.restarts < restarts:
            assert time.monotonic() < deadline, found
            time.sleep(0.02)
        return found

    def join(self) -> None:
        self.epoch += 1
        assert self.ask(Join(self.epoch)) == Joined(self.epoch)

    def steps(self, *firsts: int, **also) -> list[bytes]:
        """Sealed steps 0, 1, ... of this epoch, one row each. `also`: by field, what else each says."""
        sealed, checksum = [], first_checksum(self.epoch)
        for number, first in enumerate(firsts):
            fields = {name: values[number] for name, values in also.items()}
            step = Step(self.epoch, number, ints([0]), ints([number]), ints([1]), ints([1]), ints([first]), **fields)
            packed, checksum = pack_step(step, checksum)
            sealed.append(seal_step(packed))
        return sealed


@pytest.fixture
def fake_ranks(monkeypatch):
    """The module of a fake rank, which processes of this test can import; none of them is left at the end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
    yield "ranks.fake_rank"
    assert not [child for child in psutil.Process().children() if "fake_rank" in " ".join(child.cmdline())]


@pytest.fixture
def pool(fake_ranks):
    with closing(RankPool(fake_ranks)) as pool:
        yield pool


@pytest.fixture
def lead(fake_ranks, pool, run_dir):  # its leaders are stopped before the pool is closed
    """lead(**settings) -> a Front at a started leader of fake ranks."""
    fronts: list[Front] = []

    def start(model: str = "echo", stage: int = 0, launcher: Launcher | None = None, push=None, maps=None, **settings) -> Front:
        made = make_settings({"model": model, **settings})
        leader = Leader(made, stage, run_dir, launcher or LocalLauncher(fake_ranks), push=push, maps=maps)
        leader.start()
        fronts.append(Front(leader))
        return fronts[-1]

    yield start
    for front in fronts:
        front.leader.stop()
