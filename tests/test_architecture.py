"""The rules of the house: allowed imports, and sizes of modules and functions."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "freegpt_auth"
MODULES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in MODULES}


def imported(path: Path) -> set[str]:
    """Return the modules of the package that a module imports, whenever it does."""
    names = set()
    folders = path.parent.relative_to(PACKAGE).parts
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(folders[: len(folders) + 1 - node.level])
            names.add(f"{base}.{node.module}".strip(".") if node.module else base)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_longer_than_a_reader_can_hold(path: Path) -> None:
    """A module has one concept and at most 250 lines, a function at most 40, its docstring left out."""
    assert len(path.read_text().splitlines()) <= 250
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[1:] if ast.get_docstring(node) else node.body
            assert not first or (node.end_lineno or 0) - first[0].lineno < 40, node.name


@pytest.mark.parametrize(
    "name",
    ["names", "tokens", *(f"guard.{each}" for each in ("credentials", "cors", "denials", "delivery", "exemptions"))],
)
def test_pure_modules_import_no_engine(name: str) -> None:
    """A token, credentials and denials can be read without the rest of the library."""
    allowed = {"exceptions", "names", "tokens", "guard.denials"} - {name}
    assert imported(PACKAGE / f"{name.replace('.', '/')}.py") <= allowed


@pytest.mark.parametrize("path", sorted((PACKAGE / "guard").glob("*.py")), ids=lambda path: path.stem)
def test_guard_imports_no_engine(path: Path) -> None:
    """The request path knows the contract of a token source, and neither a file nor a database."""
    assert not {name for name in imported(path) if name.startswith(("stores", "usage"))} - {"stores.base"}


def test_the_middleware_is_the_top() -> None:
    """Nothing but the package's front door imports the middleware: dependencies point downward only."""
    importers = [path.name for path in MODULES if "middleware" in imported(path)]
    assert importers == ["__init__.py"]


def test_only_the_settings_read_the_environment() -> None:
    """Environment variables are read in one module."""
    readers = {path.name for path in MODULES if "os.environ" in path.read_text() or "getenv" in path.read_text()}
    assert readers == {"settings.py"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_can_be_imported_alone(path: Path) -> None:
    """No import cycle: each module can be the first that a program imports."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    name = ".".join(part for part in parts if part != "__init__")
    subprocess.run([sys.executable, "-c", f"import {name}"], check=True, timeout=30)
