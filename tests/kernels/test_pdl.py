"""Kernels that start early: each waits before it writes, and a captured chain of them gives what they give one at a time."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import trireme_kernels
from trireme_kernels.choose import Choices

KERNELS = Path(trireme_kernels.__file__).parent


def early_kernels():
    for path in sorted(KERNELS.glob("*/tl.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "PDL" in {argument.arg for argument in node.args.args}:
                yield pytest.param(node, id=path.parent.name)


@pytest.mark.parametrize("kernel", early_kernels())
def test_every_program_waits_before_it_writes(kernel: ast.FunctionDef):
    """The wait is a statement of the kernel's own, under no condition; no program has stored or returned before it."""
    waits = [nth for nth, statement in enumerate(kernel.body) if ast.unparse(statement) == "after_earlier(PDL)"]
    assert len(waits) == 1
    for statement in kernel.body[: waits[0]]:
        assert not any(isinstance(node, ast.Return) for node in ast.walk(statement))
        assert ".store(" not in ast.unparse(statement)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("num_rows", [1, 2, 16, 40, 4100])
def test_a_captured_chain_is_in_order(num_rows):
    """Twelve layers of norm, gated product, product; every replay from other numbers, with nothing waited for in between."""
    hidden, width, dtype = 1024, 3072, torch.bfloat16
    choices, draw = Choices("cuda", dtype), torch.Generator("cuda").manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=draw, device="cuda") * shape[-1] ** -0.5).to(dtype)

    layers = [(numbers(2 * width, hidden), numbers(hidden, width)) for _ in range(12)]
    weight = torch.ones(hidden, device="cuda", dtype=dtype)
    norm, add_norm, multiply = choices("rms_norm"), choices("add_rms_norm"), choices("linear", num_in=width)
    swiglu = choices("swiglu", num_in=hidden)

    def chain(x: torch.Tensor, pause) -> torch.Tensor:
        residual = torch.zeros_like(x)
        for gate_up, down in layers:
            x, residual = add_norm(x, residual, weight, 1e-6)
            pause()
            for step in (lambda x, w=gate_up: swiglu(x, w), lambda x, w=down: multiply(x, w), lambda x: norm(x, weight, 1e-6)):
                x = step(x)
                pause()
        return x + residual

    starts = [torch.randn(num_rows, hidden, generator=draw, device="cuda").to(dtype) for _ in range(20)]
    expected = [chain(start, torch.cuda.synchronize) for start in starts]
    x, graph = starts[0].clone(), torch.cuda.CUDAGraph()
    chain(x, lambda: None)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = chain(x, lambda: None)
    found = []
    for start in starts:
        x.copy_(start)
        graph.replay()
        found.append(y.clone())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(chain(start, lambda: None), other) for start, other in zip(starts, expected, strict=True))
