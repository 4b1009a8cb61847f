"""Every implementation that can run here gives what the op's reference gives, on every case of its cases.py."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

import trireme_kernels
from trireme_kernels.choose import build, implementations, misfit

OPS = sorted(path.parent.name for path in Path(trireme_kernels.__file__).parent.glob("*/op.py"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def compared():
    for op in OPS:
        for name in implementations(op):
            for case in import_module(f"trireme_kernels.{op}.cases").CASES:
                if name != "reference":
                    yield pytest.param(op, name, replace(case, device=DEVICE), id=f"{op}-{name}-{case}")


@pytest.mark.parametrize(("op", "name", "case"), list(compared()))
def test_equals_reference(op, name, case):
    reason = misfit(op, name, case, forced=True)
    if reason is not None:
        pytest.skip(reason)
    cases = import_module(f"trireme_kernels.{op}.cases")
    inputs = cases.inputs(case, seed=1)
    expected = cases.results(build(op, "reference", case), inputs)
    found = cases.results(build(op, name, case), inputs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, atol=TOLERANCE[case.dtype], rtol=TOLERANCE[case.dtype])


@pytest.mark.parametrize("op", OPS)
def test_folder_is_complete(op):
    """The reference is last, since it fits everything."""
    assert implementations(op)[-1] == "reference"
    cases = import_module(f"trireme_kernels.{op}.cases")
    case = cases.CASES[0]
    assert all(torch.is_tensor(result) for result in cases.results(build(op, "reference", case), cases.inputs(case, seed=0)))
