"""ServerProcess: a real tritonserver on free ports over a generated repository, and proof that its end leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from trireme.core.settings import make_settings
from trireme.serve.place import run_folder
from trireme.serve.repository import write_repository
from trireme_tools.server_home import command, find_server, lay_out
from trireme_tools.supervisor import HeldPorts

SHM = Path("/dev/shm")


# A call that the front made in the instant in which the server ended its thread pool: freed later, it crashes 24.10 (README, Limits).
_FELL = "TRITONBACKEND_ModelInstanceFinalize in "


class ServerProcess:
    """`with ServerProcess(folder, model=..., **settings) as server:` is ready inside. `explicit`: models can be loaded again;
    else the server is started as by hand. `flags`: more of the server's own."""

    def __init__(
        self, folder: Path, *, explicit: bool = True, flags: tuple[str, ...] = (), repository: Path | None = None, **settings: Any
    ):
        self.folder = folder
        self.settings = make_settings({"kv_cache_memory_bytes": 4 << 20, "threads_per_rank": 1, "start_timeout_s": 120.0, **settings})
        self.repository = repository or folder / "repository"
        if repository is None:
            write_repository(self.settings, self.repository)
        self._held = HeldPorts.free()
        ports = self._held.ports
        self.http, self.grpc, self.metrics = ports.http, ports.grpc, ports.metrics
        self.prefix = f"trireme_test_{os.getpid()}_{self.http}_"
        home = find_server()
        backends = lay_out(home, folder / "backends")
        argv = command(home, repository=self.repository, backend_dir=backends, ports=ports, thread_pool=64, shm_prefix=self.prefix)
        if not explicit:
            argv = [word for word in argv if not word.startswith(("--model-control-mode", "--load-model"))]
        self._argv, self._env = [*argv, *flags], home.environment() | {"OMP_NUM_THREADS": "1", "TRIREME_LOG": "INFO"}
        self.process: subprocess.Popen | None = None

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def start(self) -> ServerProcess:
        with open(self.folder / "log", "wb") as log:
            self.process = subprocess.Popen(self._argv, env=self._env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        return self

    def __enter__(self) -> ServerProcess:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        """Until the front has answered a request of one token."""
        deadline = time.monotonic() + timeout_s
        while True:
            assert self.process is not None and self.process.poll() is None, f"the server ended:\n{self.log[-4000:]}"
            try:
                status, _ = self.generate(input_ids=[3], max_tokens=1)
            except OSError:
                status = 0
            if status == 200:
                return
            assert time.monotonic() < deadline, self.log[-4000:]
            time.sleep(0.2)

    # ---- asking

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 60.0) -> tuple[int, str]:
        """(HTTP status, text)"""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http}{path}", json.dumps(body).encode(), method="POST")
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def generate(self, **body: Any) -> tuple[int, dict[str, Any]]:
        status, text = self.post("/v2/models/llm/generate", body)
        return status, json.loads(text)

    def stream(self, **body: Any) -> list[dict[str, Any]]:
        status, text = self.post("/v2/models/llm/generate_stream", {"stream": True, **body})
        assert status == 200, text
        return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]

    def metric(self, name: str, **labels: str) -> float:
        """Sum over the series of one metric that have these labels; 0 where there is none yet."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [
            line
            for line in lines
            if line.startswith(f"trireme_{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items())
        ]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)

    def await_metric(self, name: str, value: float, timeout_s: float = 30.0, **labels: str) -> None:
        deadline = time.monotonic() + timeout_s
        while self.metric(name, **labels) != value:
            assert time.monotonic() < deadline, f"{name} {labels} is {self.metric(name, **labels)}, not {value}"
            time.sleep(0.2)

    # ---- processes

    def family(self) -> list[psutil.Process]:
        """Everything the server started and that still lives: stubs share its session, ranks name its run folder."""
        assert self.process is not None, "started"
        found = []
        for process in psutil.process_iter():
            try:
                ours = os.getsid(process.pid) == self.process.pid or str(run_folder(self.process.pid)) in " ".join(process.cmdline())
            except (ProcessLookupError, psutil.Error):
                continue
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def stub(self, model: str) -> psutil.Process:
        return next(process for process in self.family() if any(word.startswith(f"{model}_0_") for word in process.cmdline()))

    def rank(self, stage: int, rank: int = 0) -> psutil.Process:
        return next(process for process in self.family() if f'"stage":{stage},"rank":{rank},' in "".join(process.cmdline()))

    def stop(self, *, cancelled: bool = False) -> None:
        """As a user does it; then nothing of it may be left.

        `cancelled`: gRPC clients have cancelled streams. Then this server (24.10) may hold on to their model until its exit
        timeout and end with 1 (seen also where every request is answered by a loop of four lines), so its exit code and
        shared memory, which `trireme serve` sweeps, say nothing."""
        assert self.process is not None, "started"
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(40)
            deadline = time.monotonic() + 5
            while self.family() and time.monotonic() < deadline:
                time.sleep(0.1)
            left = (
                [process.cmdline()[:3] for process in self.family()],
                list(SHM.glob(f"{self.prefix}*")),
                run_folder(self.process.pid).exists(),
            )
            fell = _FELL in self.log  # of itself, while it took a model down; what it leaves then `trireme serve` sweeps
            if fell or (cancelled and code == 1):
                left = (left[0], [], left[2])
            assert code == 0 or cancelled or fell, self.log[-4000:]
            assert left == ([], [], False), self.log[-4000:]
        finally:
            self.kill()

    def kill(self) -> None:
        """Sweep, whatever there is."""
        self._held.close()
        if self.process is None:
            return
        family = self.family()
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=10)
        self.process.wait()
        for region in SHM.glob(f"{self.prefix}*"):
            region.unlink()
