"""`trireme serve` with a real tritonserver: ready line, a dead front, and nothing left behind after a stop, a crash or a kill."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from layout.sources import HOME, ROOTS
from trireme.serve.place import run_folder
from trireme_tools.supervisor import HeldPorts

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}


class Served:
    """A `trireme serve` that said it is ready."""

    def __init__(self, process: subprocess.Popen, http: int, log: Path):
        self.process, self.http, self._log = process, http, log
        (self.server,) = psutil.Process(process.pid).children()

    def stub(self, model: str) -> psutil.Process:
        return next(child for child in self.family() if f"{model}_0_0" in child.cmdline())

    def ask(self, num_tokens: int = 8) -> list[int]:
        body = json.dumps({"input_ids": [5, 6, 7], "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/models/llm/generate", body, timeout=60) as answer:
            return json.loads(answer.read())["output_ids"]

    def aborted_by_itself(self) -> bool:
        """24.10 does, about once in thirty deaths of a stub on a quiet machine: one of its threads finds a lock in shared memory
        in a state that boost throws at. Nothing of ours can heal that."""
        return "boost::interprocess::lock_exception" in self._log.read_text()

    def family(self) -> list[psutil.Process]:
        family = [self.server, *self.server.children(recursive=True)]
        return [process for process in family if process.status() != psutil.STATUS_ZOMBIE]


@contextlib.contextmanager
def serving(tmp_path: Path) -> Iterator[Served]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with contextlib.closing(HeldPorts.free()) as held:  # the supervisor holds them itself
        ports = held.ports
    words = [f"--http-port={ports.http}", f"--grpc-port={ports.grpc}", f"--metrics-port={ports.metrics}"]
    words += ["--load-format=dummy", "--pp=2", "--threads-per-rank=1", "--kv-cache-memory-bytes=4000000"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from trireme_tools.cli import main; main()", "serve", str(tmp_path), *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(str(HOME / root) for root in ROOTS)},
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "log").open("w"),
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert "trireme ready" in line, (tmp_path / "log").read_text()
        yield Served(process, ports.http, tmp_path / "log")
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    with serving(tmp_path) as served:
        yield served


def assert_nothing_left(family: list[psutil.Process], supervisor: int) -> None:
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not list(Path("/dev/shm").glob(f"trireme_{supervisor}_*"))
    folder = run_folder(family[0].pid)
    assert not folder.exists() or not any(folder.iterdir())  # an empty one goes with the next start


def test_a_dead_front_comes_back_and_a_stop_leaves_nothing(served: Served):
    tokens, family = served.ask(), served.family()
    served.stub("llm").kill()
    deadline = time.monotonic() + 60
    while True:
        try:
            assert served.ask() == tokens
            break
        except OSError:
            assert time.monotonic() < deadline, "the front did not come back"
            time.sleep(0.2)
    family = list({*family, *served.family()})
    family.sort(key=lambda process: process.pid != served.server.pid)
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0
    assert_nothing_left(family, served.process.pid)


@pytest.mark.timeout(400)
def test_twenty_dead_stages_in_a_row_under_load(tmp_path):
    """Each time every request under way ends with the tokens it would have had; then a clean stop. A server that aborts by
    itself is swept, and the next one goes on."""
    kills, aborts = 0, 0
    while kills < 20:
        with serving(tmp_path) as served:
            tokens = served.ask(150)
            try:
                for kills in range(kills + 1, 21):  # noqa: B020  (counts on)
                    kill_a_stage_under_load(served, kills % 2, tokens)
            except OSError:
                assert served.aborted_by_itself(), f"kill {kills}"
                aborts += 1
            else:
                family = served.family()
                served.process.send_signal(signal.SIGTERM)
                assert served.process.wait(60) == 0
                assert_nothing_left(family, served.process.pid)
        assert aborts < 5


def kill_a_stage_under_load(served: Served, stage: int, tokens: list[int]) -> None:
    with ThreadPoolExecutor(6) as clients:
        asked = [clients.submit(served.ask, 150) for _ in range(6)]
        time.sleep(0.1)
        served.stub(f"stage_{stage}").kill()
        assert [answer.result() for answer in asked] == [tokens] * 6


def test_a_crash_of_the_server_is_said_and_swept(served: Served):
    family = served.family()
    served.server.kill()
    assert served.process.wait(60) == 2
    assert_nothing_left(family, served.process.pid)


def test_a_killed_supervisor_takes_its_server_along(served: Served):
    family = served.family()
    served.process.kill()
    assert_nothing_left(family, served.process.pid)
