"""The project's sources as syntax trees, read once: what the house rules look at. Imports nothing of the project."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).resolve().parents[2]
ROOTS = {"backend": "trireme", "kernels": "trireme_kernels", "tools": "trireme_tools"}


class Source(NamedTuple):
    path: str  # from the project's home
    module: str  # dotted; empty for a test
    tree: ast.Module

    @property
    def room(self) -> str:
        """`core`, `engine`, ...; `model` for model.py; the package's name for kernels and tools; empty for a test."""
        parts = self.module.split(".")
        return parts[1] if parts[0] == "trireme" and len(parts) > 1 else parts[0]


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file of backend, kernels, tools and tests."""
    found = []
    for root in (*ROOTS, "tests"):
        for path in sorted((HOME / root).rglob("*.py")):
            inside = path.relative_to(HOME / root).with_suffix("")
            parts = inside.parts[:-1] if inside.name == "__init__" else inside.parts
            found.append(Source(str(path.relative_to(HOME)), "" if root == "tests" else ".".join(parts), ast.parse(path.read_text())))
    return tuple(found)


def product() -> list[Source]:
    """All but the tests."""
    return [source for source in sources() if source.module]


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports when it runs (also inside functions); `from a import b` gives a and a.b."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not _is_for_types(node):
            yield from imports(node)


def launched(tree: ast.Module) -> set[str]:
    """Kernels of the Triton language that a file launches: `name[grid](...)` of a function decorated with jit."""
    jitted = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list)
    }
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return jitted & {call.value.id for call in calls if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)}


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
