"""The model repository of any Settings: one model.json, and a config.pbtxt for the front, each stage and `eplb`. Data only, no code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trireme.core.refusal import Refusal
from trireme.core.settings import Settings, write_settings
from trireme.serve.signature import EPLB_INPUTS, EPLB_OUTPUTS, INPUTS, OUTPUTS, STAGE_INPUTS, STAGE_OUTPUTS

BACKEND = "trireme"
FRONT, EPLB = "llm", "eplb"

_TENSORS = {"front": (INPUTS, OUTPUTS), "stage": (STAGE_INPUTS, STAGE_OUTPUTS), "eplb": (EPLB_INPUTS, EPLB_OUTPUTS)}
_NEEDED = {("stage", "MESSAGE")}  # inputs, by role; the others are optional


def stage_name(stage: int) -> str:
    return f"stage_{stage}"


def tensors(role: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(inputs, outputs) of a model of ours, as auto-complete wants them."""
    inputs, outputs = _TENSORS[role]
    return [field.config(optional=(role, field.name) not in _NEEDED) for field in inputs], [field.config() for field in outputs]


def files(settings: Settings) -> dict[Path, str]:
    """Every file of the repository, by its path in it."""
    written = {
        Path(FRONT, "config.pbtxt"): _config(FRONT, "front", decoupled=True),
        Path(FRONT, "1", "model.json"): write_settings(settings),
    }
    followers = {stage_name(stage): _config(stage_name(stage), "stage", stage=str(stage)) for stage in range(settings.num_stages)}
    if settings.eplb is not None:
        followers[EPLB] = _config(EPLB, "eplb")
    for name, config in followers.items():
        written[Path(name, "config.pbtxt")] = config
        written[Path(name, "1", "model.json")] = json.dumps({"settings": f"../../{FRONT}/1/model.json"}) + "\n"
    return written


def write_repository(settings: Settings, directory: Path) -> None:
    """Writes the files; others in the directory stay. Refusal for a model beyond these: a server would load it, too."""
    stale = stage_name(settings.num_stages)
    if (directory / stale).exists():
        raise Refusal(
            f"{directory} has a {stale}, and {settings.num_stages} stages are to be written",
            why="a server would load it, too",
            fix="remove the old stages, or name another directory",
        )
    if settings.eplb is None and (directory / EPLB).exists():
        raise Refusal(
            f"{directory} has a model {EPLB}, and the settings have none",
            why="a server would load it, too",
            fix="remove it, set eplb, or name another directory",
        )
    for path, text in files(settings).items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


def _config(name: str, role: str, *, decoupled: bool = False, **parameters: str) -> str:
    """config.pbtxt, whole: it serves with --disable-auto-complete-config too."""
    lines = [f'name: "{name}"', f'backend: "{BACKEND}"', "max_batch_size: 0"]
    if decoupled:
        lines.append("model_transaction_policy { decoupled: true }")
    lines.append("instance_group [ { count: 1 kind: KIND_CPU } ]")
    for key, value in {"role": role, **parameters}.items():
        lines.append(f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}')
    inputs, outputs = _TENSORS[role]
    for field in inputs:
        optional = "" if (role, field.name) in _NEEDED else " optional: true"
        lines.append(f'input [ {{ name: "{field.name}" data_type: TYPE_{field.type} dims: [ {field.dim} ]{optional} }} ]')
    lines += [f'output [ {{ name: "{field.name}" data_type: TYPE_{field.type} dims: [ {field.dim} ] }} ]' for field in outputs]
    return "\n".join(lines) + "\n"
