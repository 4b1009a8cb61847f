"""Where the project lies: the folder with backend/, kernels/, tools/ and model_repository/. Nothing of the server here."""

from __future__ import annotations

import os
from pathlib import Path

from trireme.core.refusal import Refusal


def project_home() -> Path:
    """$TRIREME_HOME, else the checkout that this file is part of, else the current folder where it holds a model_repository."""
    if "TRIREME_HOME" in os.environ:
        return Path(os.environ["TRIREME_HOME"]).resolve()
    checkout = Path(__file__).resolve().parents[2]
    for folder in (checkout, Path.cwd()):
        if (folder / "model_repository").is_dir():
            return folder
    raise Refusal("no model_repository here", why="trireme was not started in its checkout", fix="cd there, or set TRIREME_HOME")
