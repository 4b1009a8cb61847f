"""`trireme repo`: writes the model repository that serves a checkpoint, for a plain tritonserver. Starts nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from trireme.core.refusal import Refusal
from trireme.core.settings import make_settings
from trireme.serve.checks import check_checkpoint
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
    settings = override(make_settings({"model": str(model_dir.resolve())}), chosen)
    check_checkpoint(settings)  # not the devices: they are of the host that serves
    if relative:
        settings = msgspec.structs.replace(settings, model=os.path.relpath(settings.model, output.resolve().parent))
    try:
        write_repository(settings, output)
    except OSError as error:
        raise Refusal(f"{output} cannot be written", why=str(error), fix="name a directory that can be") from None
    for path in sorted(files(settings)):
        print(output / path)
