"""The page of the Python API says what the source says, and all that is public."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import dovetail

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def make_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "docs/make_api.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs/api.md").read_text(encoding="utf-8")


def test_the_page_is_what_the_source_says(make_api: ModuleType, page: str) -> None:
    """If this fails: `make docs-api`."""
    assert page == make_api.api_page()


def test_every_public_name_is_on_the_page(page: str) -> None:
    assert [
        n for n in dovetail.__all__ if n != "__version__" and f"from dovetail import {n}\n" not in page
    ] == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_name_that_an_example_imports_is_on_the_page(example: Path, page: str) -> None:
    for node in ast.walk(ast.parse(example.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dovetail"):
            for name in node.names:
                assert f"from {node.module} import {name.name}\n" in page


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("def f(a: int, b=2, *, c: str = 'x') -> None: ...", "f(a: int, b=2, *, c: str='x') -> None"),
        ("def f(self, *rest, **more): ...", "f(*rest, **more)"),
        ("def f(): ...", "f()"),
    ],
)
def test_a_short_signature_stays_on_one_line(make_api: ModuleType, source: str, line: str) -> None:
    assert make_api.signature(ast.parse(source).body[0]) == line


def test_a_long_signature_has_a_parameter_a_line(make_api: ModuleType) -> None:
    names = ", ".join(f"parameter_number_{i}: int" for i in range(4))
    source = f"def long(first, {names}, *rest: str, last: bool = True, **more: int) -> None: ..."
    lines = make_api.signature(ast.parse(source).body[0]).splitlines()
    assert lines[:2] == ["long(", "    first,"]
    assert lines[6:] == ["    *rest: str,", "    last: bool = True,", "    **more: int,", ") -> None"]
