"""`trireme repo`: writes the model repository that serves a checkpoint, for a plain tritonserver. Starts nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings
from trireme.serve.repository import files, write_repository
from trireme_tools.settings_options import override, settings_options


@settings_options
def repo(
    model_dir: Annotated[Path, typer.Argument(help="Checkpoint directory.")],
    output: Annotated[Path, typer.Argument(help="Model repository to write.")],
    *,
    relative: Annotated[bool, typer.Option(help="Name the checkpoint relative to the repository's parent.")] = False,
    chosen: dict[str, Any],
) -> None:
    """Write a model repository: config.pbtxt of every model, and model.json, the one file to edit."""
    model = model_dir.resolve()
    name = os.path.relpath(model, output.resolve().parent) if relative else str(model)
    settings = override(make_settings({"model": name}), chosen)
    try:
        write_repository(settings, output)
    except OSError as error:
        raise Refusal(f"{output} cannot be written", why=str(error), fix="name a directory that can be") from None
    for path in sorted(files(settings)):
        print(output / path)
