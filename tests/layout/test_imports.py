"""House rules of imports: rooms in one order, torch only where tensors are, collectives in two files."""

from __future__ import annotations

import ast

import pytest

from layout.sources import Source, imports, product

# What each room may import of ours, besides itself.
MAY_IMPORT = {
    "trireme": set(),
    "core": set(),
    "parallel": {"core"},
    "layers": {"core", "parallel", "trireme_kernels"},
    "models": {"core", "parallel", "layers", "trireme_kernels"},
    "weights": {"core", "parallel", "layers", "models"},
    "ranks": {"core", "parallel", "layers", "models", "weights", "trireme_kernels"},
    "engine": {"core"},
    "serve": {"core", "parallel", "layers", "models", "weights", "ranks", "engine"},
    "model": {"serve", "core"},
    "trireme_kernels": set(),
}
# Modules without torch that a room below them may know: what a checkpoint is, and what it costs.
BELOW = {"trireme.models.spec", "trireme.models.cost", "trireme.models.cut"}

TORCH_FREE = ("trireme.core", "trireme.engine", "trireme.serve", "trireme.model", "trireme.parallel.plan", "trireme.models.planner")
TORCH_FREE_RANKS = tuple(f"trireme.ranks.{name}" for name in ("leader", "launch", "pool", "channel", "local"))
HEAVY = {"torch", "transformers", "flashinfer", "triton"}

# `torch.distributed` for data, and for the store where they meet
MAY_COMMUNICATE = {"backend/trireme/parallel/comm.py", "backend/trireme/parallel/link.py"}


def test_rooms_import_one_way():
    wrong = []
    for source in product():
        if source.room == "trireme_tools":
            continue  # on top of everything
        for name in imports(source.tree):
            room = _room(name)
            if room and room != source.room and room not in MAY_IMPORT[source.room] and not _is_below(name):
                wrong.append(f"{source.path} imports {name}")
    assert not wrong


def test_no_room_imports_the_tools():
    assert not [source.path for source in product() if source.room != "trireme_tools" and _imports(source, "trireme_tools")]


@pytest.mark.parametrize("module", [*TORCH_FREE, *TORCH_FREE_RANKS, *sorted(BELOW)])
def test_torch_is_not_reached(module: str):
    """The server's stubs, the scheduler and the leaders start in a blink and hold no CUDA context."""
    by_name = {source.module: source for source in product()}
    starts = [name for name in by_name if (name == module or name.startswith(module + ".")) and name != "trireme.core.batch"]
    seen, queue = set(starts), list(starts)
    while queue:
        source = by_name[queue.pop()]
        for name in imports(source.tree):
            assert name.split(".")[0] not in HEAVY, f"{source.path} imports {name}"
            if name in by_name and name not in seen:
                seen.add(name)
                queue.append(name)


def test_collectives_are_in_two_files():
    users = {source.path for source in product() if _imports(source, "torch.distributed") or _uses_distributed(source.tree)}
    assert users <= MAY_COMMUNICATE


def _room(name: str) -> str:
    parts = name.split(".")
    if parts[0] in ("trireme_kernels", "trireme_tools"):
        return parts[0]
    return parts[1] if parts[0] == "trireme" and len(parts) > 1 else ""


def _is_below(name: str) -> bool:
    return any(name == module or name.startswith(module + ".") for module in BELOW) or name == "trireme.models"


def _imports(source: Source, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(source.tree))


def _uses_distributed(tree: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == "distributed" and isinstance(node.value, ast.Name) and node.value.id == "torch"
        for node in ast.walk(tree)
    )
