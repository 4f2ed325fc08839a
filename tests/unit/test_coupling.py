"""Couplings that imports between rooms do not show: circles among modules, and private members of others."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping

import pytest
from test_architecture import MODULES, imported_modules, parse

TREES = {module: parse(module) for module in MODULES}


def graph_of(trees: Mapping[str, ast.AST]) -> dict[str, set[str]]:
    """What each module imports of the others: inside functions and for annotations too."""
    return {module: (imported_modules(tree) & trees.keys()) - {module} for module, tree in trees.items()}


def circles(graph: Mapping[str, set[str]]) -> set[tuple[str, ...]]:
    """The largest groups of modules each of which needs, by some way, all others of its group."""
    reached = {module: reach(graph, module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other])) for module in graph
    }
    return {group for group in groups if len(group) > 1}


def reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found, new = set(), {start}
    while new:
        found |= new
        new = set().union(*(graph[module] for module in new)) - found
    return found


def test_no_module_needs_itself_by_way_of_others() -> None:
    assert not circles(graph_of(TREES)), "modules import each other: move what both need into a third one"


def test_the_circle_test_sees() -> None:
    sources = {
        "a": "from b import x",
        "b": "def f():\n    import c",
        "c": "if TYPE_CHECKING:\n    from a import y",
        "d": "import a",
        "e": "import d, e",
    }
    assert circles(graph_of({name: ast.parse(text) for name, text in sources.items()})) == {("a", "b", "c")}


# --- private members -----------------------------------------------------------------------------------

# Uses that are still there, by module: a new one is an error, and so is one of these that is gone.
USES: dict[str, set[str]] = {}
# The second half was written with protected members, for classes of the same package: they may stay there.
PROTECTED = ("gradq.quant", "gradq.export")
# Members of torch's own objects that a class of ours calls by the same name.
TORCH = {"_buffers", "_get_backend", "_ops", "_threads", "_timeout"}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_members(cls: ast.ClassDef) -> Iterator[str]:
    """What a class defines: methods, attributes of the class, and what its methods assign to self."""
    for node in cls.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (target.id for target in targets if isinstance(target, ast.Name))
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            yield node.attr


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def owners_of(trees: Mapping[str, ast.AST]) -> dict[str, set[tuple[str, str]]]:
    """Which classes, by module and name, define a private member."""
    owners: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for name in filter(is_private, private_members(node)):
                    owners[name].add((module, node.name))
    return owners


def foreign_uses(trees: Mapping[str, ast.AST]) -> dict[str, set[str]]:
    """Private members that a module uses although the class around does not define them, by module."""
    owners, uses = owners_of(trees), defaultdict(set)

    def look(module: str, node: ast.AST, cls: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute) and child.attr in owners:
                own = owners[child.attr]
                inside = any(owner == module for owner, _ in own) and not _is_self(child.value)
                if (module, cls) not in own and not inside:  # one module may know its own classes
                    uses[module].add(child.attr)
            look(module, child, child.name if isinstance(child, ast.ClassDef) else cls)

    for module, tree in trees.items():
        look(module, tree, "")
    return uses


def private_imports(tree: ast.AST) -> set[str]:
    """Private names of other modules of gradq; private modules do not count."""
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gradq")
        for alias in node.names
        if is_private(alias.name) and f"{node.module}.{alias.name}" not in MODULES
    }


FOREIGN = foreign_uses(TREES)


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(PROTECTED)])
def test_nobody_uses_private_members_of_other_classes(module: str) -> None:
    found, known = FOREIGN.get(module, set()) - TORCH, USES.get(module, set())
    assert not found - known, f"{module} uses {found - known} of other classes: make it public, or ask for it"
    assert not known - found, f"{module} no longer uses {known - found}: take it out of USES"


@pytest.mark.parametrize("module", [name for name in MODULES if not name.startswith(PROTECTED)])
def test_nobody_imports_private_names(module: str) -> None:
    assert not private_imports(TREES[module])


def test_the_member_test_sees() -> None:
    sources = {
        "a": "class A:\n    _x = 1\n    def __init__(self):\n        self._y = 2\n    def _z(self): ...",
        "b": "def f(a):\n    return a._x + a._unknown",
        "c": "class C(A):\n    def g(self):\n        return self._y, self._own\n    _own = 1",
        "d": "class D:\n    _z = 1\n    def h(self, other):\n        return self._z + other._z",
        "e": "class E:\n    _x = 1\ndef f(e):\n    return e._x\nclass F(E):\n    def g(self): return self._x",
    }
    assert foreign_uses({name: ast.parse(text) for name, text in sources.items()}) == {
        "b": {"_x"},
        "c": {"_y"},
        "e": {"_x"},
    }
    assert private_imports(ast.parse("from gradq.rng import _mix")) == {"gradq.rng._mix"}
