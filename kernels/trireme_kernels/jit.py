"""jit: kernels in the Triton language whose launches cost the host little, since a step has hundreds of them.

triton.jit binds and names all arguments anew at each launch, writes down in words what it finds of them, to look up which of the
kernels that it has compiled fits, and asks the driver of every address. Of nine arguments that takes 20.6 us on the host of an H100, and
what it then calls with addresses as numbers 5.8. Here a function is written for each kernel when it is first launched, which looks up by
the values themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, KernelParam


def jit(function: Callable | None = None, **how: Any) -> Any:
    """triton.jit, for what the host launches. A parameter is always given a tensor, an integer or a float; those that are
    tl.constexpr come last."""
    if function is None:
        return partial(jit, **how)
    return triton.jit(function, **how) if knobs.runtime.interpret else Kernel(function, **how)


class _Variant(NamedTuple):
    """A kernel as it was compiled for one kind of arguments."""

    launch: Callable[..., None]
    function: int
    metadata: tuple


class Kernel(JITFunction):
    """kernel[grid](*arguments, CONSTANT=..., num_warps=...), as a JITFunction."""

    def __init__(self, function: Callable, **how: Any):
        super().__init__(function, **how)
        self.variants: dict[tuple, _Variant] = {}
        self._launch: Callable[..., None] | None = None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch or self._first, grid)

    def _first(self, grid: tuple[int, ...], *arguments: Any, **named: Any) -> None:
        active: Any = driver.active
        scope: dict[str, Any] = {"kernel": self, "device_now": active.get_current_device, "stream_now": active.get_current_stream}
        exec(_written(self.params, arguments), scope)
        launch = self._launch = scope["launch"]
        launch(grid, *arguments, **named)

    def compiled(self, key: tuple, grid: tuple[int, ...], arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Launch as triton.jit does, which compiles what is new, and keep what it launched."""
        made: Any = self.run(*arguments, grid=grid, warmup=False, **options)
        self.variants[key] = _Variant(made.run, made.function, made.packed_metadata)


def _written(params: Sequence[KernelParam], arguments: Sequence[Any]) -> str:
    """A launch in Python, for parameters that take such arguments. Its key tells apart all that triton.jit compiles apart: types,
    and of numbers and addresses whether they are a multiple of 16, of numbers whether they are 1."""
    names, reads, key, given = [param.name for param in params], [], ["device"], []
    for param, argument in zip(params, arguments, strict=False):
        name, known = param.name, not param.do_not_specialize
        if isinstance(argument, torch.Tensor):
            reads.append(f"at_{name} = {name}.data_ptr()")
            key.append(f"{name}.dtype")
            key += [f"at_{name} % 16 == 0"] if known and not param.do_not_specialize_on_alignment else []
            given.append(f"at_{name}")
        else:
            assert type(argument) in (int, float), f"{name} is {argument!r}, neither a tensor nor a number"
            if isinstance(argument, int):
                key.append(f"1 if {name} == 1 else ({name} % 16 == 0, {name} >> 31)" if known else f"{name} >> 31")
            given.append(name)
    assert all(param.is_constexpr for param in params[len(arguments) :]), "constants are given by name, and nothing else"
    constants = names[len(arguments) :]
    launched = ["x", "y", "z", "stream_now(device)", "variant.function", "variant.metadata", "None", "None", "None", *given, *constants]
    lines = [
        f"def launch(grid, {', '.join(names)}, **options):",
        "    device = device_now()",
        *(f"    {line}" for line in reads),
        f"    key = ({', '.join([*key, *constants, '*options.items()'])})",
        "    variant = kernel.variants.get(key)",
        "    if variant is None:",
        f"        return kernel.compiled(key, grid, ({', '.join(names)}), options)",
        "    x, y, z = (*grid, 1, 1)[:3]",
        f"    variant.launch({', '.join(launched)})",
    ]
    return "\n".join(lines)
