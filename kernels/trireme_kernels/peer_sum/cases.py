"""Cases and inputs of peer_sum, for tests and benchmarks: one rank's calls, to whom the others have written already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trireme_kernels.case import Case, Work
from trireme_kernels.peer_sum.op import PeerSum, bits_of, empty_of, keys_of

_NUM_CELLS = 8

CASES = (
    Case("cpu", torch.float32, {"hidden": 64, "rows": 1, "size": 2, "place": 0}),
    Case("cpu", torch.float32, {"hidden": 96, "rows": 5, "size": 4, "place": 3}),
    Case("cpu", torch.bfloat16, {"hidden": 64, "rows": 3, "size": 2, "place": 1}),
    Case("cpu", torch.bfloat16, {"hidden": 40, "rows": 8, "size": 8, "place": 2, "wide_weight": 1}),
)
# Qwen3-8B, alone: the share of the time in which nobody is waited for
BENCH = tuple(Case("cpu", torch.bfloat16, {"hidden": 4096, "rows": rows, "size": 1, "place": 0}) for rows in (1, 8))


@dataclass(frozen=True)
class Laid:
    """Boxes of ranks that are all here."""

    place: int
    every: Sequence[Tensor]
    addresses: Tensor
    turns: Tensor
    given_up: Tensor


def lay(size: int, place: int, hidden: int, dtype: torch.dtype, device: str) -> Laid:
    """Empty ones."""
    bits, cell = bits_of(dtype), 1 << (hidden - 1).bit_length()
    every = [torch.full((2, size, _NUM_CELLS, cell), empty_of(bits), dtype=bits, device=device) for _ in range(size)]
    given_up = torch.zeros(1, dtype=torch.int32, device=device)
    addresses = torch.tensor([*(box.data_ptr() for box in every), given_up.data_ptr()], device=device)
    return Laid(place, every, addresses, torch.zeros(_NUM_CELLS, dtype=torch.int32, device=device), given_up)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor, float, int]:
    """(what each rank brings [W, T, H], residual [T, H], weight [H], eps, place)"""
    rows, hidden, size = (case.sizes[name] for name in ("rows", "hidden", "size"))
    draw = torch.Generator(case.device).manual_seed(seed)
    shapes = ((size, rows, hidden), (rows, hidden), (hidden,))
    parts, residual, weight = (torch.randn(*shape, generator=draw, device=case.device) for shape in shapes)
    parts[:, :, ::7] = -0.0  # EMPTY, if it were written as it is
    weight = weight if case.sizes.get("wide_weight") else weight.to(case.dtype)
    return parts.to(case.dtype), residual.to(case.dtype), weight, 1e-5, case.sizes["place"]


def results(op: PeerSum, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes, and what it leaves in the boxes, after calls of all kinds and of many rows and few."""
    parts, residual, weight, eps, place = inputs
    boxes = lay(len(parts), place, parts.shape[-1], parts.dtype, parts.device.type)
    found = []
    for rows in (len(residual), 1, len(residual)):
        _write(boxes, _bits(parts[:, :rows]))
        found += op.sum_norm(parts[place, :rows], residual[:rows], weight, eps, boxes)
        _write(boxes, _bits(parts[:, :1, :1]))
        found.append(op.sum(parts[place, 0, :1].clone(), boxes))
        values = parts[:, 0, :9].float().round()  # of which some are equal
        ids = torch.arange(values.numel(), device=values.device).view(values.shape).flip(0)
        _write(boxes, keys_of(values, ids)[:, None])
        found += op.best(values[place], ids[place], boxes)
    return *found, boxes.turns, *(box.int() for box in boxes.every)


def _bits(parts: Tensor) -> Tensor:
    bits = parts.contiguous().view(bits_of(parts.dtype))
    return bits.masked_fill(bits == empty_of(bits.dtype), 0)


def _write(boxes: Laid, parts: Tensor) -> None:
    """As the others would, for the next call, [W, cells, n]: they come to it with as many calls behind them."""
    box, num = boxes.every[boxes.place].view(parts.dtype), parts.shape[-1]
    for cell, turn in enumerate((boxes.turns[: parts.shape[1]] % 2).tolist()):
        for place in range(len(parts)):
            if place != boxes.place:
                box[turn, place, cell, :num] = parts[place, cell]


def timed(op: PeerSum, inputs: tuple) -> Callable[[], Any]:
    """What a benchmark repeats: the calls of a rank that is alone, since nobody writes for the others."""
    parts, residual, weight, eps, place = inputs
    boxes = lay(1, 0, parts.shape[-1], parts.dtype, parts.device.type)
    return lambda: op.sum_norm(parts[place], residual, weight, eps, boxes)


def work(inputs: tuple) -> Work:
    parts, residual, weight, _, _ = inputs
    return Work(2 * parts[0].nbytes + 2 * residual.nbytes + weight.nbytes)
