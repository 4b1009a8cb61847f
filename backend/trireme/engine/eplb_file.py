"""Files of loads and maps: arrays by name in a safetensors file, tied to the model and the plan that they are of."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from trireme.core.refusal import Refusal


class Origin(NamedTuple):
    """Whose loads and maps: hashes that must be equal for them to mean the same."""

    model: str
    plan: str

    @classmethod
    def of(cls, config: bytes, plan: str) -> Origin:
        """Of a checkpoint's config.json and whatever text says how it is spread."""
        return cls(hashlib.sha256(config).hexdigest()[:16], hashlib.sha256(plan.encode()).hexdigest()[:16])


class Contents(NamedTuple):
    path: Path
    origin: Origin
    arrays: dict[str, np.ndarray]  # stage_K.loads, stage_K.maps, ...
    notes: dict[str, str]

    def stage(self, stage: int, name: str) -> np.ndarray | None:
        return self.arrays.get(f"stage_{stage}.{name}")

    def check(self, origin: Origin, *, any_plan: bool = False) -> None:
        """Refusal where they are of another model, or of another plan."""
        part, ours, theirs = "model", origin.model, self.origin.model
        if ours == theirs and not any_plan:
            part, ours, theirs = "plan", origin.plan, self.origin.plan
        if ours != theirs:
            raise Refusal(
                f"{self.path} is of another {part}",
                why=f"it was made for {part} {theirs} and this server has {ours}: layers, experts or ranks are not the same",
                fix="move it away, or name the one that was made here",
            )


def write(path: Path, origin: Origin, arrays: dict[str, np.ndarray], notes: dict[str, str] | None = None) -> None:
    """The file as a whole or not at all: whoever reads meanwhile finds the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, unfinished, {**(notes or {}), **origin._asdict()})
    unfinished.replace(path)


def read(path: Path) -> Contents:
    """Refusal where there is none, or where it is something else."""
    try:
        with safe_open(path, framework="numpy") as file:
            notes = dict(file.metadata() or {})
            origin = Origin(notes.pop("model"), notes.pop("plan"))
            return Contents(path, origin, {name: file.get_tensor(name) for name in file.keys()}, notes)  # noqa: SIM118
    except FileNotFoundError:
        fix = "record loads with the model `eplb`, or name a file that it saved"
        raise Refusal(f"{path} is missing", why="expert maps or loads are to come from it", fix=fix) from None
    except (SafetensorError, KeyError, OSError) as error:
        why = f"it cannot be read as safetensors with the hashes of a model and a plan: {error}"
        raise Refusal(f"{path} is no file of expert loads or maps", why=why, fix="name a file that the model `eplb` saved") from None
