"""Cases and inputs of grouped_linear, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from trireme_kernels.case import Case
from trireme_kernels.grouped_linear.op import GroupedLinear

CASES = (
    Case("cpu", torch.float32, {"num_slots": 12, "num_in": 72, "num_out": 50, "rows": 5, "spare": 0}),
    Case("cpu", torch.bfloat16, {"num_slots": 5, "num_in": 200, "num_out": 136, "rows": 70, "spare": 0}),
    Case("cpu", torch.bfloat16, {"num_slots": 3, "num_in": 64, "num_out": 128, "rows": 300, "spare": 0}),
    Case("cpu", torch.float32, {"num_slots": 7, "num_in": 40, "num_out": 24, "rows": 20, "spare": 100}),
    Case("cpu", torch.bfloat16, {"num_slots": 4, "num_in": 48, "num_out": 16, "rows": 0, "spare": 9}),
    Case("cpu", torch.float32, {"num_slots": 4, "num_in": 48, "num_out": 16, "rows": 0, "spare": 0}),
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(x, weight, counts): `rows` rows dealt to slots very unevenly, the first slot and often others empty; then `spare`
    rows of no slot, which are nan."""
    size, draw = case.sizes, torch.Generator().manual_seed(seed)
    share = torch.rand(size["num_slots"], generator=draw) ** 3
    share[0] = 0
    slots = torch.multinomial(share, max(1, size["rows"]), replacement=True, generator=draw)[: size["rows"]]
    counts = slots.bincount(minlength=size["num_slots"])
    x = torch.randn(size["rows"] + size["spare"], size["num_in"], generator=draw)
    x[size["rows"] :] = torch.nan
    weight = torch.randn(size["num_slots"], size["num_out"], size["num_in"], generator=draw) * size["num_in"] ** -0.5
    return x.to(case.device, case.dtype), weight.to(case.device, case.dtype), counts.to(case.device)


def results(op: GroupedLinear, inputs: tuple) -> tuple[Tensor, ...]:
    """All that the op computes."""
    x, weight, counts = inputs
    return (op.run(x, weight, op.plan(counts, len(x))),)
