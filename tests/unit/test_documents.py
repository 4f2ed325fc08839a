"""What the documentation says exists does: files, links, dotted names; and the examples in docstrings run."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_architecture import MODULES, ROOT

CHECKOUT = ROOT.parent
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
CODE = re.compile(r"(?s)^```.*?^```", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")
PATH = re.compile(r"`((?:gradq|tests|benchmarks|examples|launch|docs)/[\w./-]*)`")
NAME = re.compile(r"`(gradq(?:\.\w+)+)(?:\(.*?\))?`")
ROOM = re.compile(r'\w+\["(.*?)<br/>')


def without_code(page: Path) -> str:
    return CODE.sub("", page.read_text())


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    text = without_code(page)
    links = [link for link in LINK.findall(text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [path for path in PATH.findall(text) if "<" not in path and not (CHECKOUT / path).exists()]
    assert not missing, f"{page.name} names {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_that_a_page_uses_exist(page: Path) -> None:
    missing = {name for name in NAME.findall(without_code(page)) if not exists(name)}
    assert not missing, f"{page.name} uses {missing}"


def test_the_figure_shows_the_rooms() -> None:
    """Every room of gradq but the second half and the small ones stands in the figure or below it."""
    text = (CHECKOUT / "docs" / "architecture.md").read_text()
    rooms = {room for label in ROOM.findall(text) for room in label.split(", ")}
    assert rooms
    assert not {room for room in rooms if not (ROOT / room).exists()}
    units = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert not {unit for unit in units if f"{unit}/" not in text and f"gradq.{unit}" not in text}


def test_the_glossary_has_a_meaning_for_every_word() -> None:
    text = (CHECKOUT / "docs" / "architecture.md").read_text()
    rows = text.partition("## Words")[2].partition("\n## ")[0].splitlines()
    rows = [row for row in rows if row.startswith("|")][2:]
    assert len(rows) > 15
    assert all(len(cell.strip()) > 3 for row in rows for cell in row.strip("|").split("|"))


# --- docstrings ----------------------------------------------------------------------------------------


def with_examples() -> Iterator[str]:
    for module, path in MODULES.items():
        text = path.read_text()
        if ">>>" in text and any(">>>" in (doc or "") for doc in _docstrings(ast.parse(text))):
            yield module


def _docstrings(tree: ast.AST) -> Iterator[str | None]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))


@pytest.mark.parametrize("module", list(with_examples()))
def test_examples_in_docstrings_run(module: str) -> None:
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner(verbose=False)
    examples = 0
    for test in finder.find(imported, module):
        result = runner.run(test)
        assert not result.failed, f"{test.name}: {result.failed} of {result.attempted} examples fail"
        examples += len(test.examples)
    assert examples, f"{module} shows examples that doctest does not find"
