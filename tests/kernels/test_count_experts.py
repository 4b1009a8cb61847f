"""count_experts: counts grow by what is there, and rows that fill up a graph are nobody's."""

from __future__ import annotations

import pytest
import torch

from trireme_kernels.case import Case
from trireme_kernels.choose import build, misfit


@pytest.mark.parametrize("name", ["reference", "tl"])
def test_counts_grow_in_place(name: str):
    case = Case("cuda" if torch.cuda.is_available() else "cpu", torch.float32)
    if (reason := misfit("count_experts", name, case, forced=True)) is not None:
        pytest.skip(reason)
    count = build("count_experts", name, case)
    experts = torch.tensor([[0, 1], [1, 3], [1, 0], [0, 2]], device=case.device)
    counts = torch.zeros(4, dtype=torch.int32, device=case.device)
    for num_rows, wanted in ((3, [2, 3, 0, 1]), (0, [2, 3, 0, 1]), (None, [5, 6, 1, 2]), (4, [8, 9, 2, 3])):
        count(experts, None if num_rows is None else torch.tensor([num_rows], device=case.device), counts)
        assert counts.tolist() == wanted
