"""Checkpoints on disk: one file, many with an index, many without; and broken ones by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from trireme.core.refusal import Refusal
from trireme.weights.reader import Checkpoint

A, B = torch.arange(12.0).reshape(4, 3), torch.arange(5).to(torch.bfloat16)


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture(params=["one", "indexed", "loose"])
def directory(request, tmp_path: Path) -> Path:
    if request.param == "one":
        save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    else:
        save_file({"a": A}, tmp_path / "part-1.safetensors")
        save_file({"b": B}, tmp_path / "part-2.safetensors")
    if request.param == "indexed":
        write_index(tmp_path, {"a": "part-1.safetensors", "b": "part-2.safetensors"})
        save_file({"c": A}, tmp_path / "consolidated.safetensors")  # not in the index: not of the checkpoint
    return tmp_path


def test_tensors_are_listed_unread(directory: Path):
    with Checkpoint(directory) as checkpoint:
        assert {name: (stored.shape, stored.dtype, stored.num_bytes) for name, stored in checkpoint.tensors.items()} == {
            "a": ((4, 3), "F32", 48),
            "b": ((5,), "BF16", 10),
        }


def test_slices_are_read(directory: Path):
    with Checkpoint(directory) as checkpoint:
        for run in ((slice(1, 3), slice(0, 3)), (slice(0, 4), slice(2, 3)), (slice(3, 4), slice(1, 3)), (slice(4, 4), slice(0, 3))):
            part = checkpoint.read("a", run)
            assert torch.equal(part, A[run]) and checkpoint.tensors["a"].bytes_of(run) == part.nbytes
        assert torch.equal(checkpoint.read("b"), B)


def test_no_weights(tmp_path: Path):
    with pytest.raises(Refusal, match=r"no \*\.safetensors"):
        Checkpoint(tmp_path)


def test_a_file_of_the_index_is_gone(directory: Path):
    write_index(directory, {"a": "part-9.safetensors"})
    with pytest.raises(Refusal, match=r"part-9\.safetensors.*not there"):
        Checkpoint(directory)


def test_a_file_lacks_what_the_index_says(tmp_path: Path):
    save_file({"a": A}, tmp_path / "part-1.safetensors")
    write_index(tmp_path, {"z": "part-1.safetensors"})
    with pytest.raises(Refusal, match="no such tensor"):
        Checkpoint(tmp_path)


def test_a_cut_off_file(tmp_path: Path):
    save_file({"a": A}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(Refusal, match=r"cannot read .*model\.safetensors"):
        Checkpoint(tmp_path)


def test_a_name_in_two_files(tmp_path: Path):
    save_file({"a": A}, tmp_path / "part-1.safetensors")
    save_file({"a": A}, tmp_path / "part-2.safetensors")
    with pytest.raises(Refusal, match=r"part-1\.safetensors has a too"):
        Checkpoint(tmp_path)
