"""A launch that is looked up tells apart what triton.jit compiles apart, and hands on the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from trireme_kernels.blocks import cdiv, next_power_of_2
from trireme_kernels.jit import _Variant, _written


class Parameter(NamedTuple):
    name: str
    do_not_specialize: bool = False
    do_not_specialize_on_alignment: bool = False
    is_constexpr: bool = False


PARAMETERS = (
    Parameter("x"),
    Parameter("at", do_not_specialize_on_alignment=True),
    Parameter("stride"),
    Parameter("num_rows", do_not_specialize=True),
    Parameter("eps"),
    Parameter("BLOCK", is_constexpr=True),
)


class Compiler:
    """In a kernel's place: every key is new to it once."""

    def __init__(self):
        self.variants: dict[tuple, _Variant] = {}
        self.compiled_for: list[tuple] = []
        self.launched: list[tuple] = []

    def compiled(self, key: tuple, grid: tuple, arguments: tuple, options: dict) -> None:
        self.variants[key] = _Variant(lambda *given: self.launched.append(given), len(self.variants), ())
        self.compiled_for.append((grid, arguments, options))


@pytest.fixture
def compiler() -> Compiler:
    return Compiler()


@pytest.fixture
def launch(compiler) -> Callable[..., None]:
    x, scope = torch.zeros(1), {"kernel": compiler, "device_now": lambda: 0, "stream_now": lambda device: 7}
    exec(_written(PARAMETERS, (x, x, 1, 1, 1.0)), scope)  # pyright: ignore[reportArgumentType]
    return scope["launch"]


X = torch.zeros(64)


def arguments(**changed: Any) -> dict[str, Any]:
    return {"grid": (3,), "x": X, "at": X, "stride": 48, "num_rows": 5, "eps": 1e-6, "BLOCK": 64} | changed


@pytest.mark.parametrize(
    "other",
    [
        {"x": X[1:]},
        {"x": X.bfloat16()},
        {"stride": 50},
        {"stride": 1},
        {"stride": 1 << 32},
        {"num_rows": 1 << 32},
        {"BLOCK": 32},
        {"num_warps": 8},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_is_compiled_apart_is_told_apart(launch, compiler, other):
    launch(**arguments())
    launch(**arguments(**other))
    assert len(compiler.compiled_for) == 2
    grid, given, options = compiler.compiled_for[1]
    wanted = arguments(**other)
    assert grid == (3,) and options == {name: value for name, value in other.items() if name == "num_warps"}
    assert all(one is wanted[name] for one, name in zip(given, ("x", "at", "stride", "num_rows", "eps", "BLOCK"), strict=True))


@pytest.mark.parametrize(
    "other",
    [{"x": X[4:]}, {"at": X[1:]}, {"stride": 64 + 16}, {"num_rows": 1}, {"num_rows": 16}, {"eps": 1.0}, {"grid": (1, 2)}],
    ids=lambda other: next(iter(other)),
)
def test_what_is_compiled_alike_is_launched_at_once(launch, compiler, other):
    launch(**arguments())
    launch(**arguments(**other))
    assert len(compiler.compiled_for) == 1
    wanted, [given] = arguments(**other), compiler.launched
    addresses = wanted["x"].data_ptr(), wanted["at"].data_ptr()
    numbers = wanted["stride"], wanted["num_rows"], wanted["eps"], wanted["BLOCK"]
    assert given == (*(*wanted["grid"], 1, 1)[:3], 7, 0, (), None, None, None, *addresses, *numbers)


@pytest.mark.parametrize("other", [None, True, np.int64(48)], ids=lambda other: type(other).__name__)
def test_what_no_key_tells_apart_is_not_launched(other):
    """triton.jit compiles these apart from numbers of the same value, or makes constants of them."""
    with pytest.raises(AssertionError, match="stride"):
        _written(PARAMETERS, (X, X, other, 1, 1.0))  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_second_launch_is_not_tritons(monkeypatch):
    from trireme_kernels.rms_norm import reference, tl

    x, weight = torch.randn(9, 65, device="cuda"), torch.randn(64, device="cuda")
    cases = [x[:8, :64], x[1:, 1:], x[:1, :64].contiguous()]  # whose rows begin at other multiples of four bytes
    for case in cases:
        torch.testing.assert_close(tl.rms_norm(case, weight, 1e-6), reference.rms_norm(case, weight, 1e-6))
    monkeypatch.setattr(tl._rms_norm_rows, "run", None)
    for case in cases:
        torch.testing.assert_close(tl.rms_norm(case, weight, 1e-6), reference.rms_norm(case, weight, 1e-6))


def test_blocks_are_those_of_triton():
    import triton

    for length in range(1, 70):
        assert next_power_of_2(length) == triton.next_power_of_2(length)
        assert cdiv(length, 16) == triton.cdiv(length, 16)
