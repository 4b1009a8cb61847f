"""Load: fill a stage's parameters from a checkpoint, slice by slice, and account for every byte; or fill them with noise."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from trireme.core.refusal import Refusal
from trireme.models.decoder import Decoder
from trireme.weights.names import Sorting, sort
from trireme.weights.reader import Checkpoint

Progress = Callable[[int, int], None]  # bytes read, bytes to read


@dataclass(frozen=True)
class Manifest:
    """What became of a checkpoint's bytes on one rank: file = used + elsewhere + dropped. A tied embedding is used on both
    ends."""

    file_bytes: int  # of all tensors in the checkpoint
    used_bytes: int  # of tensors that this rank reads from, each counted whole and once
    read_bytes: int  # slices read from those
    elsewhere_bytes: int  # of tensors that only other stages use, or only other ranks' experts
    dropped_bytes: int  # of tensors that the family's table passes over
    param_bytes: int  # of this rank's parameters, all filled

    def __str__(self) -> str:
        return f"{self.param_bytes / 1e6:.1f} MB of parameters from {self.read_bytes / 1e6:.1f} of {self.file_bytes / 1e6:.1f} MB"


def load(decoder: Decoder, model_dir: str | Path, progress: Progress | None = None) -> Manifest:
    """Fill every parameter of the decoder exactly once. Refusal where tensors are missing, left over or misshapen."""
    params = dict(decoder.params())
    with Checkpoint(model_dir) as checkpoint:
        sorting = sort(checkpoint.tensors, decoder, decoder.build.spec.num_layers)
        _refuse_other_twins(checkpoint, sorting)
        pieces = [
            (use, piece) for use in sorting.uses for piece in params[use.target].pieces(use.parts, use.expert, interleaved=use.interleaved)
        ]
        to_read = sum(checkpoint.tensors[use.tensor].bytes_of(piece.source) for use, piece in pieces)
        filled, read_bytes = Counter(), 0
        for use, piece in pieces:
            run = checkpoint.read(use.tensor, piece.source)
            filled[use.target] += params[use.target].fill(piece, run)
            read_bytes += run.nbytes
            if progress is not None:
                progress(read_bytes, to_read)
        manifest = _account(checkpoint, sorting, read_bytes, sum(filled.values()))
    for name, param in params.items():
        assert filled[name] == param.nbytes, f"{name}: {filled[name]} of {param.nbytes} bytes filled"
    decoder.prepare()
    return manifest


def _refuse_other_twins(checkpoint: Checkpoint, sorting: Sorting) -> None:
    for name, twin in sorting.twins:
        one, other = checkpoint.read(name), checkpoint.read(twin)
        if not torch.equal(one, other):
            raise Refusal(
                f"config.json ties {name} to {twin}, but the checkpoint has both and they differ",
                why="one of them would be left out",
                fix="set tie_word_embeddings to false in config.json if the head is its own",
            )


def _account(checkpoint: Checkpoint, sorting: Sorting, read_bytes: int, param_bytes: int) -> Manifest:
    def num_bytes(names: Iterable[str]) -> int:
        return sum(checkpoint.tensors[name].num_bytes for name in names)

    manifest = Manifest(
        file_bytes=num_bytes(checkpoint.tensors),
        used_bytes=num_bytes(sorting.used),
        read_bytes=read_bytes,
        elsewhere_bytes=num_bytes(sorting.elsewhere),
        dropped_bytes=num_bytes(sorting.dropped),
        param_bytes=param_bytes,
    )
    assert manifest.file_bytes == manifest.used_bytes + manifest.elsewhere_bytes + manifest.dropped_bytes, manifest
    return manifest


def fill_dummy(decoder: Decoder, seed: int = 0) -> Manifest:
    """Noise that depends on the seed and a tensor's name alone, so that any plan has the same model: tensors are made whole,
    one part of one expert at a time, and cut like a checkpoint's. Norms are one. For measuring, and for tests without a
    checkpoint. Made where the weights live (a GPU takes seconds for billions), whose kind of device has numbers of its own."""
    num_bytes = 0
    for name, param in decoder.params():
        for part, expert in param.cells():
            if param.dim() == 1 and name.endswith("norm"):
                whole = torch.full(param.shape, 1.0 - param.plus, device=param.device)
            else:
                noise = torch.Generator(param.device).manual_seed(zlib.crc32(f"{_origin(decoder, name)} {part} {expert}".encode(), seed))
                whole = torch.empty(param.tensor_shape((part,), expert), device=param.device).normal_(0.0, 0.02, generator=noise)
            for piece in param.pieces((part,), expert):  # of an expert, one for each of its copies here
                param.fill(piece, whole[piece.source])
        num_bytes += param.nbytes
    decoder.prepare()
    return Manifest(0, 0, 0, 0, 0, num_bytes)


def _origin(decoder: Decoder, name: str) -> str:
    """The parameter that a checkpoint fills with the same tensor, of the first stage that has it."""
    return "embed.weight" if name == "mtp.embed.weight" or (decoder.tied and name == "head.proj.weight") else name
