"""Supervisor: one real tritonserver from start to a clean stop. Says when it answers, loads a dead front again, leaves nothing behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.serve.checks import ServerFlags, check_server, open_calls
from trireme.serve.place import run_folder, sweep_run_folders
from trireme.serve.repository import FRONT
from trireme_tools.server_home import Ports, ServerHome, check_libraries, command, lay_out

_STUB_INSTANCE = 8  # place of the instance name in a stub's arguments
_SHM = Path("/dev/shm")
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5
_EXIT_S = 30.0  # a stop may take: unloading models, and the server's own exit timeout


@dataclass
class Supervisor:
    """Runs the server of `repository`. `start`, `wait_ready`, then `watch` until `stop`; or `with supervisor:` for all."""

    home: ServerHome
    repository: Path
    settings: Settings
    backend_dir: Path
    wanted: Ports | None = None  # None: the usual ones, or free ones where another server is up or starting
    log: IO | None = None  # where the server's output goes; None: this process' own
    say: Callable[[str], None] = print  # what the supervisor does
    news: Callable[[str], None] = lambda reason: None  # why the front does not answer yet, as it changes (the server logs it too)
    server: subprocess.Popen | None = field(default=None, init=False)
    _shm_prefix: str = field(default="", init=False)
    _held: HeldPorts | None = field(default=None, init=False)
    _front: psutil.Process | None = field(default=None, init=False)  # as last seen
    stopping: bool = field(default=False, init=False)

    def __enter__(self) -> Supervisor:
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    @property
    def ports(self) -> Ports:
        assert self._held is not None, "a server that was started has ports"
        return self._held.ports

    def start(self) -> None:
        """Starts the server and returns. Refusal for what would make it hang or fail later."""
        sweep_run_folders()
        check_libraries(self.home)
        self._held = HeldPorts.open() if self.wanted is None else HeldPorts(self.wanted)
        lay_out(self.home, self.backend_dir)
        self._shm_prefix = f"trireme_{os.getpid()}_{time.monotonic_ns()}_"
        argv = command(
            self.home,
            repository=self.repository,
            backend_dir=self.backend_dir,
            ports=self.ports,
            thread_pool=thread_pool(self.settings),
            shm_prefix=self._shm_prefix,
        )
        check_server(self.settings, ServerFlags.read(argv))
        # a session of its own: Ctrl-C must reach us alone, and everything the server ever starts can be found by it
        self.server = subprocess.Popen(
            argv,
            env=self.home.environment(),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log and subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )

    def wait_ready(self) -> bool:
        """True when the front has answered a request of one token, False where a stop was asked first. Refusal where the
        server ended or took too long."""
        deadline, reason = time.monotonic() + self.settings.start_timeout_s, ""
        while (found := self._unready()) is not None:
            if self.stopping:
                return False
            if self.server is None or self.server.poll() is not None:
                code = self.server and self.server.returncode
                raise Refusal(f"the server ended while starting, exit code {code}", why=reason, fix="see its output", kind="unavailable")
            if time.monotonic() > deadline:
                raise Refusal(
                    f"not ready after {self.settings.start_timeout_s:.0f} s", why=found, fix="raise --start-timeout-s", kind="unavailable"
                )
            if found != reason:
                self.news(found)
                reason = found
            time.sleep(_POLL_S)
        return True

    def watch(self) -> int:
        """Waits until the server ends or `stop` is called, loading the front again where its process died. The exit code."""
        assert self.server is not None, "watch comes after start"
        while not self.stopping and self.server.poll() is None:
            if self._front_died():
                self.say(f"the front ({FRONT}) died: loading it again")
                self._reload_front()
            time.sleep(_POLL_S)
        return self.server.poll() or 0

    def ask_stop(self) -> None:
        """Ends `watch`; for signal handlers."""
        self.stopping = True

    def stop(self) -> int:
        """Ends the server and sweeps what it left: processes, shared memory, run folder. Its exit code (0 where it never ran)."""
        self.stopping = True
        if self.server is None:
            self._give_ports_back()
            return 0
        if self.server.poll() is None:
            self.server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.server.wait(_EXIT_S)
        for process in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        code = self.server.wait()
        for region in _SHM.glob(f"{self._shm_prefix}*"):
            region.unlink(missing_ok=True)
        shutil.rmtree(run_folder(self.server.pid), ignore_errors=True)
        self._give_ports_back()
        return code

    def _give_ports_back(self) -> None:
        if self._held is not None:
            self._held.close()

    def _family(self) -> list[psutil.Process]:
        """Every process that the server started, orphans included: stubs share its session, ranks name its run folder."""
        assert self.server is not None, "only a started server has a family"
        folder, found = str(run_folder(self.server.pid)), []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                named = any(f'{folder}"' in word or f"{folder}/" in word for word in process.cmdline())
                if named or os.getsid(process.pid) == self.server.pid:
                    found.append(process)
        return found

    def _unready(self) -> str | None:
        """Why the front does not answer yet, or None."""
        body = {"input_ids": [1], "max_tokens": 1, "ignore_eos": True}
        try:
            self._post(f"/v2/models/{FRONT}/generate", body, timeout_s=self.settings.step_timeout_s)
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError):
                text = json.loads(text)["error"]
            if error.code == 400 and "not ready" not in text and "not found" not in text:
                raise Refusal("the front does not answer a request of one token", why=text, kind="internal") from None
            return text
        except OSError:
            return "the server is starting"
        return None

    def _front_died(self) -> bool:
        """Whether the server believes in the front but its process is gone."""
        if self._front is None or not _is_front(self._front):  # to look at every process of the host twice a second would be felt
            self._front = next(filter(_is_front, self._family()), None)
        if self._front is not None:
            return False
        with contextlib.suppress(OSError, ValueError):
            states = {model["name"]: model.get("state") for model in self._post("/v2/repository/index", {}, timeout_s=5.0)}
            return states.get(FRONT) == "READY"
        return False

    def _reload_front(self) -> None:
        try:
            for verb in ("unload", "load"):
                self._post(f"/v2/repository/models/{FRONT}/{verb}", {}, timeout_s=self.settings.start_timeout_s)
        except OSError as error:
            self.say(f"loading the front failed ({error}); trying again")

    def _post(self, path: str, body: dict[str, Any], timeout_s: float) -> Any:
        request = urllib.request.Request(f"http://{self.ports.address}:{self.ports.http}{path}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read()
        return json.loads(text) if text else None


def thread_pool(settings: Settings) -> int:
    """BLS calls and response sends share it: every step in flight holds a thread at every stage, and the calls that a dead
    stub had hold theirs for ever (twenty deaths lost 49 threads, measured)."""
    return max(256, open_calls(settings))


class HeldPorts:
    """Ports that no other supervisor of this host gets until `close` or this process' end, though the server, which loads first, takes
    them seconds later. Refusal where one is taken."""

    def __init__(self, ports: Ports):
        self.ports = ports
        self._claims: list[socket.socket] = []
        try:
            for name, port in (("http", ports.http), ("grpc", ports.grpc), ("metrics", ports.metrics)):
                self._hold(name, port)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls) -> HeldPorts:
        """The usual ones, or free ones."""
        try:
            return cls(Ports())
        except Refusal:
            return cls.free()

    @classmethod
    def free(cls) -> HeldPorts:
        """Any that nobody has. They lie below those that Linux gives to connections and to whoever asks for any port, one of whom might
        else have them when the server takes them."""
        while True:
            http, grpc, metrics = random.SystemRandom().sample(range(10_240, 32_768), 3)
            with contextlib.suppress(Refusal):
                return cls(Ports(http, grpc, metrics))

    def close(self) -> None:
        for claim in self._claims:
            claim.close()

    def _hold(self, name: str, port: int) -> None:
        fix, address = f"give another --{name}-port", self.ports.address
        if not 0 < port < 1 << 16 or [self.ports.http, self.ports.grpc, self.ports.metrics].count(port) > 1:
            raise Refusal(f"{name} port {port} cannot be used", why="the server needs three ports from 1 to 65535", fix=fix)
        claim = socket.socket(socket.AF_UNIX)  # a name without a file, which ends with its socket, and which the server does not look at
        self._claims.append(claim)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                claim.bind(f"\0trireme port {port}")  # of any address: one server may listen on all
                probe.bind((address, port))
            except OSError as error:
                raise Refusal(f"{name} port {port} is taken", why=error.strerror or str(error), fix=fix) from None


def _is_front(process: psutil.Process) -> bool:
    """By its arguments, of which a zombie has none."""
    try:
        argv = process.cmdline()
    except psutil.Error:
        return False
    return len(argv) > _STUB_INSTANCE and argv[_STUB_INSTANCE].startswith(f"{FRONT}_")


def _die_with_parent() -> None:
    """Runs in the child before exec: a supervisor that is killed takes its server along, cleanly."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
