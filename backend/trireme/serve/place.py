"""Where a model of ours finds its files: its settings, and the folder that the processes of one server share."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from trireme.core.refusal import Refusal


def model_json(args: dict[str, str]) -> Path:
    """The settings file of the model that the server loads with `args`."""
    return Path(args["model_repository"], args["model_version"], "model.json")


def run_dir() -> Path:
    """For sockets and the like: one folder for each server (the parent of every stub), private to its user. Refusal where that
    server is gone."""
    server = os.getppid()
    if server == 1 and b"1" not in Path("/proc/self/cmdline").read_bytes().split(b"\0"):
        # adopted by init: a server that itself is process 1 of its container names itself on the stub's command line
        raise Refusal("the server of this model is gone", why="it ended while the model loaded", fix="start it again", kind="unavailable")
    return run_folder(server)


def run_folder(pid: int) -> Path:
    """That of the server with this process id, or of another process that leads stages."""
    return Path(tempfile.gettempdir(), f"trireme-{os.getuid()}", str(pid))


def leave(folder: Path) -> None:
    """Remove a run folder if this was the last to use it, and those of servers that were killed."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    sweep_run_folders()


def sweep_run_folders() -> None:
    """Remove those of servers that are gone: killed, or stopped without a supervisor."""
    for folder in run_folder(0).parent.glob("[0-9]*"):
        if not Path("/proc", folder.name).exists():
            shutil.rmtree(folder, ignore_errors=True)
