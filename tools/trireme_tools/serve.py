"""`trireme serve`: a checkpoint or a model repository behind a real tritonserver, until Ctrl-C. The work is the supervisor's."""

from __future__ import annotations

import contextlib
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from trireme.core.log import logger
from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, make_settings, read_settings
from trireme.models.spec import read_spec
from trireme.parallel.plan import Plan
from trireme.serve.checks import check_checkpoint, check_devices
from trireme.serve.repository import FRONT, write_repository
from trireme_tools.home import project_home
from trireme_tools.server_home import Ports, find_server
from trireme_tools.settings_options import override, settings_options
from trireme_tools.supervisor import Supervisor


@settings_options
def serve(
    model_dir: Annotated[Path | None, typer.Argument(help="Checkpoint directory (default: what the repository names).")] = None,
    *,
    repository: Annotated[Path | None, typer.Option(help="Model repository (default: the project's model_repository/).")] = None,
    http_port: int = 8000,
    grpc_port: int = 8001,
    metrics_port: int = 8002,
    address: Annotated[str, typer.Option(help="Where the server listens.")] = "127.0.0.1",
    chosen: dict[str, Any],
) -> None:
    """Serve a checkpoint through tritonserver until Ctrl-C; prints one line when ready."""
    began, say = time.monotonic(), logger("serve").info
    with served_repository(model_dir, repository, chosen) as (models, settings):
        supervisor = Supervisor(
            find_server(),
            repository=models,
            settings=settings,
            backend_dir=backend_directory(),
            wanted=Ports(http_port, grpc_port, metrics_port, address),
            say=say,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: supervisor.ask_stop())
        try:
            supervisor.start()
            if supervisor.wait_ready():
                print(f"{ready_line(supervisor, time.monotonic() - began)}; Ctrl-C stops", flush=True)
            supervisor.watch()
            crashed = not supervisor.stopping
        finally:
            supervisor.stop()
    if crashed:
        raise Refusal("the server ended by itself", why="see its output above", fix="start it again", kind="internal")


@contextlib.contextmanager
def served_repository(model_dir: Path | None, repository: Path | None, chosen: dict[str, Any]) -> Iterator[tuple[Path, Settings]]:
    """The repository to serve and its settings: as it lies, or one made for `model_dir` and `chosen` and removed at the end."""
    repository = (repository or project_home() / "model_repository").resolve() if model_dir is None else None
    settings = settings_of(model_dir, chosen, repository)
    if repository and not chosen:
        yield repository, settings
        return
    with tempfile.TemporaryDirectory(prefix="trireme-serve-") as folder:
        made = Path(folder) / "model_repository"
        write_repository(settings, made)
        yield made, settings


def settings_of(model_dir: Path | None, chosen: dict[str, Any], repository: Path | None = None) -> Settings:
    """Of a checkpoint, else of a repository (the project's where None), with what the user chose. Refusal where this host
    cannot serve that."""
    if model_dir is not None:
        settings = make_settings({"model": str(model_dir.resolve())})
    else:
        settings = read_settings((repository or project_home() / "model_repository") / FRONT / "1" / "model.json")
    settings = override(settings, chosen)
    check_checkpoint(settings)
    check_devices(settings)
    return settings


def backend_directory() -> Path:
    """Where the server's backend directory is laid out: in the checkout, else with the user's caches."""
    try:
        return project_home() / "build" / "backends"
    except Refusal:
        return Path.home() / ".cache" / "trireme" / "backends"


def ready_line(supervisor: Supervisor, seconds: float) -> str:
    ports, settings = supervisor.ports, supervisor.settings
    plan = Plan.of(settings, read_spec(Path(settings.model)))
    return (
        f"trireme ready in {seconds:.1f} s: {Path(settings.model).name} as {FRONT} ({plan}, link={settings.link}) "
        f"on http {ports.address}:{ports.http}, grpc {ports.address}:{ports.grpc}, metrics {ports.address}:{ports.metrics}"
    )
