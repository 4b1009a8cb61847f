"""Finding a server and laying out its backend directory, on made-up installations; and the checks before a start."""

from __future__ import annotations

import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings
from trireme.serve.checks import ServerFlags
from trireme_tools import server_home
from trireme_tools.server_home import Ports, ServerHome, find_server, lay_out
from trireme_tools.supervisor import HeldPorts, thread_pool


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A server with its own Python backend, as in a container."""
    for name in ("bin/tritonserver", "backends/python/libtriton_python.so", "backends/python/triton_python_backend_stub"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        path.chmod(0o755)
    (tmp_path / "backends/python/triton_python_backend_utils.py").write_text("# utils")
    monkeypatch.delenv("TRITON_BACKENDS", raising=False)
    monkeypatch.setenv("TRITONSERVER", str(tmp_path / "bin/tritonserver"))
    return tmp_path


def test_the_named_server_comes_first(installed):
    home = find_server()
    assert home.server == installed / "bin/tritonserver" and home.python_backend == installed / "backends/python"


def test_path_comes_next(installed, monkeypatch):
    monkeypatch.delenv("TRITONSERVER")
    monkeypatch.setenv("PATH", str(installed / "bin"))
    assert find_server().server == installed / "bin/tritonserver"


def test_a_named_server_that_is_none_is_refused(installed, monkeypatch):
    monkeypatch.setenv("TRITONSERVER", str(installed / "bin"))
    (installed / "bin/tritonserver").unlink()
    monkeypatch.setenv("TRITONSERVER", str(installed / "bin/tritonserver"))
    with pytest.raises(Refusal, match="not a program"):
        find_server()


def test_a_server_without_python_backend_is_refused(installed):
    (installed / "backends/python/libtriton_python.so").unlink()
    with pytest.raises(Refusal, match="no Python backend"):
        find_server()


def test_backend_directory_is_made_and_mended(installed):
    home, directory = find_server(), installed / "laid"
    for _ in range(2):
        lay_out(home, directory)
    (installed / "backends/python/libtriton_python.so").write_text("a newer server")
    lay_out(home, directory)
    assert (directory / "python/libtriton_python.so").read_text() == "a newer server"
    assert (directory / "trireme/core/step.py").exists() and (directory / "trireme").is_symlink()
    assert not list(directory.rglob(".*"))


def test_environment_puts_this_interpreter_first(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    environment = ServerHome(Path("s"), Path("p"), Path("t"), (Path("/a"), Path("/b"))).environment()
    assert environment["PATH"] == f"{Path(sys.executable).parent}:/usr/bin" and environment["LD_LIBRARY_PATH"] == "/a:/b"


def test_the_command_passes_the_checks_of_its_own_models(installed, tmp_path):
    for model in ("llm", *(f"stage_{stage}" for stage in range(6))):
        (tmp_path / "repository" / model).mkdir(parents=True)
        (tmp_path / "repository" / model / "config.pbtxt").touch()
    settings = Settings(model="m", pipeline_parallel_size=6, async_depth=4)
    argv = server_home.command(
        find_server(),
        repository=tmp_path / "repository",
        backend_dir=tmp_path,
        ports=Ports(),
        thread_pool=thread_pool(settings),
        shm_prefix="p_",
    )
    flags = ServerFlags.read(argv)
    assert flags.explicit and flags.thread_pool >= 10 * 6 + 8


def test_free_ports_are_below_those_that_connections_get():
    with closing(HeldPorts.free()) as held:
        assert max(held.ports.http, held.ports.grpc, held.ports.metrics) < 32_768


def test_servers_that_begin_at_once_get_ports_of_their_own():
    """None of them listens yet: a server loads for seconds before it does."""
    with ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        found = [stack.enter_context(closing(each)).ports for each in pool.map(lambda _: HeldPorts.open(), range(8))]
        numbers = [number for ports in found for number in (ports.http, ports.grpc, ports.metrics)]
        assert len(set(numbers)) == len(numbers)
        with pytest.raises(Refusal, match=f"http port {found[0].http} is taken"):
            HeldPorts(found[0])
    HeldPorts(found[0]).close()


@pytest.mark.parametrize("address", ["0.0.0.0", "localhost", "127.0.0.1"])
def test_a_port_is_held_whatever_the_address_is_called(address):
    with closing(HeldPorts.free()) as held, pytest.raises(Refusal, match=f"http port {held.ports.http} is taken"):
        HeldPorts(Ports(held.ports.http, held.ports.grpc, held.ports.metrics, address))


def test_a_refused_choice_holds_nothing():
    with closing(HeldPorts.free()) as held:
        others = [port - 1 for port in (held.ports.http, held.ports.grpc)]
        for _ in range(2):
            with pytest.raises(Refusal, match=f"metrics port {held.ports.metrics} is taken"):
                HeldPorts(Ports(*others, held.ports.metrics))


def test_a_taken_port_is_refused_by_its_name():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(Refusal, match=f"http port {taken.getsockname()[1]} is taken"):
            HeldPorts(Ports(taken.getsockname()[1]))


@pytest.mark.parametrize("ports", [Ports(8000, 8000), Ports(99999), Ports(0)])
def test_ports_that_cannot_be(ports):
    with pytest.raises(Refusal, match="cannot be used"):
        HeldPorts(ports)
