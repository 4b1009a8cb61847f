"""Finds a tritonserver on this machine, lays out the backend directory it needs, and says how to start it. Starts nothing."""

from __future__ import annotations

import filecmp
import glob
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trireme
from trireme.core.devices import num_gpus
from trireme.core.refusal import Refusal

_STUB = "triton_python_backend_stub"
_UTILS = "triton_python_backend_utils.py"
_LIBRARY = "libtriton_python.so"
SHM_BYTES_PER_STUB = 4 << 20  # a stub's region to begin with; it grows by 1 MiB and never shrinks


@dataclass(frozen=True)
class ServerHome:
    """A tritonserver and what its Python backend needs."""

    server: Path
    python_backend: Path  # holds libtriton_python.so and triton_python_backend_utils.py
    stub: Path  # of this interpreter's version, where there is a choice
    libraries: tuple[Path, ...]  # in front of LD_LIBRARY_PATH
    from_wheel: bool = False  # else whoever installed it sees to its libraries; $TRITONSERVER may be a script that does

    def environment(self) -> dict[str, str]:
        """Of the server: the stub embeds the `python3` that is first on PATH, and ignores PYTHONPATH."""
        env = dict(os.environ)
        fronts = {"PATH": [Path(sys.executable).parent], "LD_LIBRARY_PATH": self.libraries}
        for name, folders in fronts.items():
            env[name] = os.pathsep.join([*map(str, folders), *filter(None, [env.get(name)])])
        return env


@dataclass(frozen=True)
class Ports:
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    address: str = "127.0.0.1"


def find_server() -> ServerHome:
    """$TRITONSERVER, PATH, /opt/tritonserver/bin, then the nvidia-pytriton wheel. Refusal where there is none, or where
    its Python backend lacks a file."""
    wheel = _wheel()
    server = _program(wheel)
    from_wheel = wheel is not None and server.is_relative_to(wheel)
    places = [Path(os.environ["TRITON_BACKENDS"]) / "python"] if "TRITON_BACKENDS" in os.environ else []
    places += [server.resolve().parent.parent / "backends" / "python", Path("/opt/tritonserver/backends/python")]
    backend = next((place for place in places if (place / _LIBRARY).exists()), None)
    if backend is None:
        raise Refusal(
            f"{server} has no Python backend", why=f"no {_LIBRARY} in {places[0]}", fix="set TRITON_BACKENDS to its backend directory"
        )
    stub = backend / _STUB
    libraries = [Path(path) for path in [sysconfig.get_config_var("LIBDIR")] if path and glob.glob(f"{path}/libpython3*.so*")]
    if from_wheel:
        assert wheel is not None
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = wheel / "python_backend_stubs" / version / _STUB
        libraries.insert(0, wheel.parents[1] / "nvidia_pytriton.libs")
    if not stub.exists():
        raise Refusal(f"no {_STUB} for this Python", why=f"{stub} is missing", fix="run trireme with Python 3.11 or 3.12")
    return ServerHome(server, backend, stub, tuple(libraries), from_wheel)


def _wheel() -> Path | None:
    """The server's folder inside the nvidia-pytriton wheel. The package itself is not imported: it would start things."""
    spec = importlib.util.find_spec("pytriton")
    return Path(spec.submodule_search_locations[0]) / "tritonserver" if spec and spec.submodule_search_locations else None


def _program(wheel: Path | None) -> Path:
    if "TRITONSERVER" in os.environ:
        given = Path(os.environ["TRITONSERVER"])
        if not os.access(given, os.X_OK):
            raise Refusal(f"TRITONSERVER={given} is not a program", why="it is set, so nothing else is tried", fix="mend or unset it")
        return given
    places = [shutil.which("tritonserver"), "/opt/tritonserver/bin/tritonserver", wheel and wheel / "bin" / "tritonserver"]
    for place in places:
        if place and os.access(place, os.X_OK):
            return Path(place)
    raise Refusal(
        "no tritonserver found",
        why="looked at $TRITONSERVER, PATH, /opt/tritonserver/bin and the nvidia-pytriton wheel",
        fix="pip install 'trireme[server]', or set TRITONSERVER",
    )


def missing_library(home: ServerHome) -> str | None:
    """A shared library that the wheel's stub links to and the loader does not find (usually libpython), or None."""
    if not home.from_wheel:
        return None
    done = subprocess.run(["ldd", str(home.stub)], env=home.environment(), capture_output=True, text=True)
    missing = [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]
    return missing[0] if missing else None


def check_libraries(home: ServerHome) -> None:
    """Refusal with the apt line where the stub cannot be loaded."""
    missing = missing_library(home)
    if missing:
        package = missing.split(".so")[0]
        raise Refusal(f"{missing} is missing", why="the server's Python stub is linked to it", fix=f"apt-get install {package}")


def lay_out(home: ServerHome, backend_dir: Path) -> Path:
    """Makes `backend_dir` the server's backend directory: python/ (library, stub, utils) and trireme/, a link to the
    package. Copies where a link would do for all but the server, which refuses a library that "escapes" its folder."""
    python = backend_dir / "python"
    python.mkdir(parents=True, exist_ok=True)
    for name, source in {_LIBRARY: home.python_backend / _LIBRARY, _UTILS: home.python_backend / _UTILS, _STUB: home.stub}.items():
        if not (python / name).exists() or not filecmp.cmp(source, python / name):
            _replace(python / name, lambda fresh, source=source: shutil.copy2(source, fresh))
    package, link = Path(trireme.__file__).resolve().parent, backend_dir / "trireme"
    if not link.is_symlink() or link.readlink() != package:
        _replace(link, lambda fresh: fresh.symlink_to(package))
    return backend_dir


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Puts what `make` makes at `path`, whole: two starts at once do not trip over each other."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    make(fresh)
    fresh.replace(path)


def models_of(repository: Path) -> list[str]:
    """Names of the models that a repository holds."""
    return sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))


def command(home: ServerHome, *, repository: Path, backend_dir: Path, ports: Ports, thread_pool: int, shm_prefix: str) -> list[str]:
    """The server's argument vector: explicit model control (so that dead models can be loaded again), all models loaded
    at once, a BLS thread pool of `thread_pool`, shared memory named `shm_prefix`..., and no CUDA pools of the server's own
    (it would open a context on each GPU; no device tensor of ours passes through it)."""
    gpus = num_gpus()
    # python-based backends take the options of `python`; under the name `trireme` they are ignored (seen on 24.10)
    python = {"thread-pool-size": thread_pool, "shm-region-prefix-name": shm_prefix, "shm-default-byte-size": SHM_BYTES_PER_STUB}
    return [
        str(home.server),
        f"--model-repository={repository}",
        f"--backend-directory={backend_dir}",
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--model-load-thread-count={max(4, len(models_of(repository)))}",
        *(f"--{name}-address={ports.address}" for name in ("http", "grpc", "metrics")),
        f"--http-port={ports.http}",
        f"--grpc-port={ports.grpc}",
        f"--metrics-port={ports.metrics}",
        *(f"--backend-config=python,{key}={value}" for key, value in python.items()),
        *(f"--cuda-memory-pool-byte-size={gpu}:0" for gpu in range(gpus)),
        f"--allow-gpu-metrics={'true' if gpus else 'false'}",
        "--pinned-memory-pool-byte-size=0",
        "--exit-timeout-secs=10",  # a stub that died while stopping would hold the exit for that long
        "--exit-on-error=true",
        "--log-info=false",
    ]
