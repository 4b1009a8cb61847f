"""The model repository of any Settings: one model.json, and a config.pbtxt for the front and each stage. Data only, no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, write_settings
from trireme.serve.signature import INPUTS, OUTPUTS, STAGE_INPUTS, STAGE_OUTPUTS, Field

BACKEND = "trireme"
FRONT = "llm"


def stage_name(stage: int) -> str:
    return f"stage_{stage}"


def tensors(role: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(inputs, outputs) of a model of ours, as auto-complete wants them."""
    inputs, outputs = (INPUTS, OUTPUTS) if role == "front" else (STAGE_INPUTS, STAGE_OUTPUTS)
    needed = {"MESSAGE"}
    return [field.config(optional=field.name not in needed) for field in inputs], [field.config() for field in outputs]


def files(settings: Settings) -> dict[Path, str]:
    """Every file of the repository, by its path in it."""
    written = {
        Path(FRONT, "config.pbtxt"): _config(FRONT, INPUTS, OUTPUTS, {"role": "front"}, decoupled=True),
        Path(FRONT, "1", "model.json"): write_settings(settings),
    }
    for stage in range(settings.num_stages):
        name = stage_name(stage)
        written[Path(name, "config.pbtxt")] = _config(name, STAGE_INPUTS, STAGE_OUTPUTS, {"role": "stage", "stage": str(stage)})
        written[Path(name, "1", "model.json")] = json.dumps({"settings": f"../../{FRONT}/1/model.json"}) + "\n"
    return written


def write_repository(settings: Settings, directory: Path) -> None:
    """Writes the files; others in the directory stay. Refusal for a stage beyond these: a server would load it, too."""
    stale = stage_name(settings.num_stages)
    if (directory / stale).exists():
        raise Refusal(
            f"{directory} has a {stale}, and {settings.num_stages} stages are to be written",
            why="a server would load it, too",
            fix="remove the old stages, or name another directory",
        )
    for path, text in files(settings).items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def _config(
    name: str, inputs: tuple[Field, ...], outputs: tuple[Field, ...], parameters: dict[str, str], *, decoupled: bool = False
) -> str:
    """config.pbtxt, whole: it serves with --disable-auto-complete-config too."""
    lines = [f'name: "{name}"', f'backend: "{BACKEND}"', "max_batch_size: 0"]
    if decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    lines.append("instance_group [ { count: 1 kind: KIND_CPU } ]")
    lines += [f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}' for key, value in parameters.items()]
    for field in inputs:
        optional = "" if field.name == "MESSAGE" else " optional: true"
        lines.append(f'input [ {{ name: "{field.name}" data_type: TYPE_{field.type} dims: [ {field.dim} ]{optional} }} ]')
    lines += [f'output [ {{ name: "{field.name}" data_type: TYPE_{field.type} dims: [ {field.dim} ] }} ]' for field in outputs]
    return "\n".join(lines) + "\n"
