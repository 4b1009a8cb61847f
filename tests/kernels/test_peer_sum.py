"""Ranks that share boxes, in processes of their own: all get the same bits, whoever is late and whatever kinds of calls follow each
other; and nobody waits who was told that the others are gone."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing

from trireme_kernels.case import Case
from trireme_kernels.choose import build
from trireme_kernels.peer_sum.cases import Laid, lay

HIDDEN, NUM_CALLS = 48, 24


def calls(size: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """What each rank brings [size, rows, HIDDEN], and the residual of a sum with a norm."""
    torch.manual_seed(0)
    rows = [(1, 5, 2)[number % 3] for number in range(NUM_CALLS)]
    return [
        (torch.randn(size, num_rows, HIDDEN), torch.randn(num_rows, HIDDEN) if number % 4 else None) for number, num_rows in enumerate(rows)
    ]


def rank(name: str, size: int, boxes: Laid, found: Any) -> None:
    torch.set_num_threads(1)
    op, late = build("peer_sum", name, Case("cpu", torch.float32, {"hidden": HIDDEN})), random.Random(boxes.place)
    addresses = torch.tensor([*(box.data_ptr() for box in boxes.every), boxes.given_up.data_ptr()])
    boxes = Laid(boxes.place, boxes.every, addresses, torch.zeros_like(boxes.turns), boxes.given_up)
    off = 0.0
    for parts, residual in calls(size):
        time.sleep(late.choice((0, 0, 0.01)))
        mine, summed = parts[boxes.place].clone(), torch.zeros_like(parts[0])
        for part in parts:
            summed += part
        if residual is None:
            off = max(off, (op.sum(mine, boxes) - summed).abs().max().item())
        else:
            _, total = op.sum_norm(mine, residual, torch.ones(HIDDEN), 1e-5, boxes)
            off = max(off, (total - (summed + residual)).abs().max().item())
        values = parts[:, 0, :7].round()  # of which some are equal
        ids = torch.arange(values.numel()).view(7, size).T
        highest, best = op.best(values[boxes.place], ids[boxes.place].contiguous(), boxes)
        off += (highest - values.amax(0)).abs().sum().item() + (best - ids[values.argmax(0), torch.arange(7)]).abs().sum().item()
    found.put(off)
    found.join()  # others map memory of this process until they are done


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "size"), [("reference", 2), ("reference", 3), ("tl", 2)])
def test_all_ranks_get_the_sums_in_order(name, size):
    if torch.cuda.is_available():
        pytest.skip("the boxes are in host memory")
    context = multiprocessing.get_context("spawn")
    found, boxes = context.JoinableQueue(), lay(size, 0, HIDDEN, torch.float32, "cpu")
    for tensor in (*boxes.every, boxes.given_up):
        tensor.share_memory_()
    ranks = [context.Process(target=rank, args=(name, size, Laid(place, *list(vars(boxes).values())[1:]), found)) for place in range(size)]
    for each in ranks:
        each.start()
    try:
        assert [found.get(timeout=120) for _ in ranks] == [0.0] * size
    finally:
        for each in ranks:
            each.kill()
            each.join()


@pytest.mark.parametrize("name", ["reference", "tl"])
def test_nobody_waits_for_those_who_are_gone(name):
    if torch.cuda.is_available():
        pytest.skip("the boxes are in host memory")
    boxes = lay(2, 0, HIDDEN, torch.float32, "cpu")
    boxes.given_up.fill_(1)
    build("peer_sum", name, Case("cpu", torch.float32, {"hidden": HIDDEN})).sum(torch.ones(2, HIDDEN), boxes)
    assert boxes.turns.sum() > 0
