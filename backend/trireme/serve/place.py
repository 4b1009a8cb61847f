"""Where a model of ours finds its files: its settings, and the folder that the processes of one server share."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path


def model_json(args: dict[str, str]) -> Path:
    """The settings file of the model that the server loads with `args`."""
    return Path(args["model_repository"], args["model_version"], "model.json")


def run_dir() -> Path:
    """For sockets and the like: one folder for each server (the parent of every stub), private to its user."""
    return Path(tempfile.gettempdir(), f"trireme-{os.getuid()}", str(os.getppid()))


def leave(folder: Path) -> None:
    """Remove a run folder if this was the last to use it, and those of servers that were killed."""
    with contextlib.suppress(OSError):
        folder.rmdir()
    with contextlib.suppress(OSError):
        for other in folder.parent.iterdir():
            if other.name.isdigit() and not Path("/proc", other.name).exists():
                shutil.rmtree(other, ignore_errors=True)
