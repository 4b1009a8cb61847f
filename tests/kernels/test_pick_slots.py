"""pick_slots: copies take turns, loads grow by what is there, and rows that fill up a graph are nobody's."""

from __future__ import annotations

import pytest
import torch

from trireme_kernels.case import Case
from trireme_kernels.choose import build, misfit


@pytest.mark.parametrize("name", ["reference", "tl"])
def test_loads_grow_in_place(name: str):
    case = Case("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    if (reason := misfit("pick_slots", name, case, forced=True)) is not None:
        pytest.skip(reason)
    pick = build("pick_slots", name, case)
    experts = torch.tensor([[0, 1], [1, 3], [1, 0], [0, 2]], device=case.device)
    copies = torch.tensor([[0, 0, 1], [1, 5, 2], [4, 0, 1], [3, 0, 1]], device=case.device)
    loads = torch.zeros(4, dtype=torch.int32, device=case.device)
    for num_rows, wanted in ((3, [2, 3, 0, 1]), (0, [2, 3, 0, 1]), (None, [5, 6, 1, 2]), (4, [8, 9, 2, 3])):
        slots = pick(experts, copies, None if num_rows is None else torch.tensor([num_rows], device=case.device), loads)
        assert loads.tolist() == wanted and slots.tolist() == [[0, 1], [5, 3], [1, 0], [0, 4]]
    pick(experts, copies, None, None)
    assert loads.tolist() == [8, 9, 2, 3]
