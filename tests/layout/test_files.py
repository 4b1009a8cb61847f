"""House rules of files: each says what it is, none is a drawer, none keeps state, op folders are whole, README's tree is the real one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from layout.sources import HOME, ROOTS, launched, product, sources

DRAWERS = re.compile(r"util|helper|manager|common|misc")
OP_FILES = {"__init__.py", "op.py", "reference.py", "cases.py"}
MUTATORS = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "remove", "discard", "clear", "appendleft"}
TREE = re.compile(r"<!-- tree -->\s*```\w*\n(.*?)```\s*<!-- /tree -->", re.DOTALL)


def test_every_file_opens_with_a_docstring():
    assert not [source.path for source in sources() if not ast.get_docstring(source.tree)]


def test_no_drawers():
    """A file is named for its one idea. `triton` is the server or the language; nothing of ours is called so."""
    names = [Path(source.path) for source in sources()]
    assert not [str(path) for path in names if DRAWERS.search(path.stem) or "triton" in path.stem]


def test_roots_are_not_packages():
    assert not [root for root in (*ROOTS, "tests") if (HOME / root / "__init__.py").exists()]


def test_no_global_statement():
    assert not [source.path for source in product() for node in ast.walk(source.tree) if isinstance(node, ast.Global)]


def test_no_module_level_state():
    """A module's tables are constants: in capitals, and nothing inside a function changes them."""
    wrong = []
    for source in product():
        tables = {name for node in source.tree.body for name in _mutable_names(node)}
        wrong += [f"{source.path}: {name}" for name in tables if not name.isupper() and not name.startswith("__")]
        functions = [node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        wrong += [f"{source.path}: {name} is changed" for function in functions for name in _changed(function) & tables]
    assert not wrong


def test_op_folders_are_whole():
    kernels = HOME / "kernels" / "trireme_kernels"
    folders = [path for path in kernels.iterdir() if path.is_dir() and path.name != "__pycache__"]
    missing = {folder.name: OP_FILES - {path.name for path in folder.iterdir()} for folder in folders}
    assert not {name: files for name, files in missing.items() if files}


def test_kernels_bear_their_op_s_name():
    """A profile shows names of kernels and nothing else: `_linear_columns`, not `_columns`."""
    wrong = []
    for source in product():
        op = Path(source.path).parent.name
        names = {name for name in launched(source.tree) if name != f"_{op}" and not name.startswith(f"_{op}_")}
        wrong += [f"{source.path}: {name}" for name in names]
    assert not wrong


def test_readme_tree_is_the_real_one():
    """Between `<!-- tree -->` and `<!-- /tree -->` README lists one path a line, two spaces deeper for each folder. All of
    them exist; every file of backend and tools, every op and every test folder is there."""
    readme = HOME / "README.md"
    if not readme.exists() or not (match := TREE.search(readme.read_text())):
        pytest.skip("README.md has no tree yet")
    listed = set(_paths(match.group(1)))
    assert not [path for path in listed if not (HOME / path).exists()]
    files = {source.path for source in product() if not source.path.endswith("__init__.py") and not source.path.startswith("kernels/")}
    folders = {str(path.parent.relative_to(HOME)) for path in (HOME / "kernels").rglob("op.py")}
    folders |= {str(Path(source.path).parent) for source in sources() if source.path.startswith("tests/")}
    assert not sorted((files | folders) - listed)


def test_make_test_runs_every_folder():
    """`make test` names them in the order in which they are dealt out."""
    rooms = re.search(r"^ROOMS\s*:= \$\(addprefix tests/,(.*)\)$", (HOME / "Makefile").read_text(), re.MULTILINE)
    assert rooms and sorted(rooms[1].split()) == sorted({path.parent.name for path in (HOME / "tests").glob("*/test_*.py")})


def _mutable_names(node: ast.stmt) -> list[str]:
    """Names that a statement at module level binds to something that can change."""
    if isinstance(node, ast.Assign):
        value, targets = node.value, node.targets
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
        value, targets = node.value, [node.target]
    else:
        return []
    made = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
    mutable = isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)
    if mutable or re.search(r"(^|\.)(dict|list|set|deque|defaultdict|Counter|Lock|RLock|Event|Queue|SimpleQueue|local)$", made):
        return [target.id for target in targets if isinstance(target, ast.Name)]
    return []


def _changed(function: ast.AST) -> set[str]:
    """Names of outside that a function writes into."""
    found, local = set(), set()
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del) and isinstance(node.value, ast.Name):
            found.add(node.value.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            found |= {node.func.value.id} if isinstance(node.func.value, ast.Name) else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            local.add(node.id)
    return found - local


def _paths(block: str) -> list[str]:
    """Paths of an indented listing whose lines are `name  clause`; folders end in /."""
    found, above = [], []
    for line in filter(str.strip, block.splitlines()):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above = [*above[:depth], name.rstrip("/")]
        found.append("/".join(above))
    return found
