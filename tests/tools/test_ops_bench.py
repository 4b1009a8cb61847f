"""`trireme bench --ops` on a CPU: every op says what it must move, and the numbers come out as JSON."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import trireme_kernels
from trireme.core.refusal import Refusal
from trireme_kernels.choose import build
from trireme_kernels.paged_attention.cases import work as attention_work
from trireme_tools.ops_bench import bench_ops

OPS = sorted(path.parent.name for path in Path(trireme_kernels.__file__).parent.glob("*/op.py"))


@pytest.mark.parametrize("op", OPS)
def test_every_op_can_be_timed(op):
    cases = import_module(f"trireme_kernels.{op}.cases")
    case = cases.CASES[0]
    inputs = cases.inputs(case, seed=0)
    cases.timed(build(op, "reference", case), inputs)()
    assert cases.work(inputs).moved_bytes > 0
    assert cases.BENCH


def test_work_of_attention():
    """Two prompts of 3 and 2 tokens: 6 + 3 pairs of query and key."""
    lens, pool = np.array([3, 2], np.int32), torch.zeros(2, 4, 16, 8)
    assert attention_work((lens, lens, None, torch.zeros(5, 12, 8), pool, pool)) == (2 * 5 * 12 * 8 * 4 + 2 * 5 * 4 * 8 * 4, 4 * 9 * 12 * 8)


def test_json(capsys):
    bench_ops("route", as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert report["ceiling"]["bytes_per_s"] > 0
    assert {row["op"] for row in report["ops"]} == {"route"}
    assert all(row["seconds"] > 0 and row["share"] > 0 for row in report["ops"])


def test_no_such_op():
    with pytest.raises(Refusal, match="there is no op norm"):
        bench_ops("norm", as_json=False)
