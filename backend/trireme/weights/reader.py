"""Reader: a checkpoint's safetensors files as one table of tensors, of which only the wanted slices are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from trireme.core.refusal import Refusal

_ITEM_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint, unread."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling: "F32", "BF16"
    file: Path

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self.dtype]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.item_bytes

    def bytes_of(self, run: tuple[slice, ...]) -> int:
        """Of a run of it, with a slice for every dim."""
        return prod(each.stop - each.start for each in run) * self.item_bytes


class Checkpoint:
    """Open files of one checkpoint; a context manager. `tensors` maps every name to what is stored."""

    def __init__(self, model_dir: str | Path):
        self._stack = ExitStack()
        self._files = {}
        self.tensors: dict[str, Stored] = {}
        index = _read_index(Path(model_dir))
        for path in sorted(set(index.values())) if index else _single_files(Path(model_dir)):
            self._open(path)
        for name in index:
            if name not in self.tensors or self.tensors[name].file != index[name]:
                raise _broken(index[name], f"the index puts {name} there, but the file has no such tensor")

    def read(self, name: str, run: tuple[slice, ...] | None = None) -> torch.Tensor:
        """A run of a tensor, or all of it, as stored."""
        file = self._files[self.tensors[name].file]
        return file.get_tensor(name) if run is None else file.get_slice(name)[run]

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise _broken(path, "the checkpoint's index names it, but it is not there")
        try:
            file = self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise _broken(path, str(error)) from None
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            view = file.get_slice(name)
            if name in self.tensors:
                raise _broken(path, f"{self.tensors[name].file.name} has {name} too")
            if view.get_dtype() not in _ITEM_BYTES:
                raise _broken(path, f"{name} is stored as {view.get_dtype()}")
            self.tensors[name] = Stored(tuple(view.get_shape()), view.get_dtype(), path)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.clear()
        self._stack.close()


def _read_index(model_dir: Path) -> dict[str, Path]:
    """Tensor name -> file of a sharded checkpoint; empty where there is no index."""
    path = model_dir / "model.safetensors.index.json"
    if not path.is_file():
        return {}
    try:
        return {name: model_dir / file for name, file in json.loads(path.read_text())["weight_map"].items()}
    except (json.JSONDecodeError, KeyError) as error:
        raise _broken(path, f"it is not an index ({error})") from None


def _single_files(model_dir: Path) -> list[Path]:
    single = model_dir / "model.safetensors"
    paths = [single] if single.is_file() else sorted(model_dir.glob("*.safetensors"))
    if not paths:
        raise Refusal(
            f"no weights in {model_dir}",
            why="it has no *.safetensors",
            fix="fetch the checkpoint's safetensors, or set load_format to dummy",
        )
    return paths


def _broken(path: Path, why: str) -> Refusal:
    return Refusal(f"cannot read {path}", why=why, fix="fetch the checkpoint again")
