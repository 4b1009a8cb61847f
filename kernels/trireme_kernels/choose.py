"""Choices: one implementation for each op and case, made once at start and printed. No op is defined here.

An op is a package `trireme_kernels.<op>`: `op.IMPLEMENTATIONS` names its implementation files, best first, and each file has
`fits(case) -> reason or None` and `build(case) -> what the op's signature promises`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from trireme_kernels.case import Case

# A file is named after what it is written in; that says which package it imports. All of these run on GPUs.
_PACKAGES = MappingProxyType({"tl": "triton", "flashinfer": "flashinfer", "fla": "fla"})


def implementations(op: str) -> tuple[str, ...]:
    """Names of the op's implementations, best first."""
    return import_module(f"trireme_kernels.{op}.op").IMPLEMENTATIONS


def misfit(op: str, name: str, case: Case, *, forced: bool = False) -> str | None:
    """Why implementation `name` of `op` does not fit `case` here, in words, or None.

    The file is imported only where its package and a GPU are there. On a CPU a forced `tl` also runs in the Triton
    language's interpreter ($TRITON_INTERPRET=1, set before anything imports triton): right, but thousands of times slower.
    """
    package = _PACKAGES.get(name)
    if package is not None:
        if find_spec(package) is None:
            return f"the package {package} is not installed"
        interpreted = forced and name == "tl" and os.environ.get("TRITON_INTERPRET") == "1"
        if case.device != "cuda" and not interpreted:
            return f"runs on cuda, not on {case.device}"
    return _file(op, name).fits(case)


def build(op: str, name: str, case: Case) -> Any:
    """Implementation `name` of `op` for a case that it fits."""
    return _file(op, name).build(case)


def _file(op: str, name: str) -> Any:
    return import_module(f"trireme_kernels.{op}.{name}")


class _Choice(NamedTuple):
    name: str
    others: dict[str, str]  # implementation passed over -> why
    built: Any


class Choices:
    """Picks implementations for one device and dtype: `choices("rms_norm", hidden=576)` is something to call.

    `force` names an implementation for an op, whatever the order; ValueError where it does not exist or fit.
    """

    def __init__(self, device: str | torch.device, dtype: torch.dtype, force: Mapping[str, str] | None = None):
        self.device, self.dtype, self.force = torch.device(device).type, dtype, dict(force or {})
        self._made: dict[tuple[str, frozenset[tuple[str, int]]], _Choice] = {}

    def __call__(self, op: str, **sizes: int) -> Any:
        key = op, frozenset(sizes.items())
        if key not in self._made:
            self._made[key] = self._choose(op, Case(self.device, self.dtype, sizes))
        return self._made[key].built

    def _choose(self, op: str, case: Case) -> _Choice:
        names, forced = implementations(op), op in self.force
        if forced:
            if self.force[op] not in names:
                raise ValueError(f"op {op} has no implementation {self.force[op]!r}; it has {', '.join(names)}")
            names = (self.force[op],)
        others: dict[str, str] = {}
        for name in names:
            reason = misfit(op, name, case, forced=forced)
            if reason is None:
                return _Choice(name, others, build(op, name, case))
            others[name] = reason
        raise ValueError(f"no implementation of {op} fits {case}: " + "; ".join(f"{name}: {why}" for name, why in others.items()))

    def table(self) -> str:
        """One line a choice: op, sizes, implementation, and why better ones were passed over."""
        rows = [
            (
                op,
                " ".join(f"{name}={size}" for name, size in sorted(sizes)),
                choice.name,
                "; ".join(f"not {name}: {why}" for name, why in choice.others.items()),
            )
            for (op, sizes), choice in self._made.items()
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
        return "\n".join(
            "  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])).rstrip() for row in rows
        )
