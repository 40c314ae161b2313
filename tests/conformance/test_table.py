"""docs/correctness.md names the test that holds each detail; this keeps the two in step."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "correctness.md"
NODE_ID = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


OTHERS = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if path != Path(__file__)]
"""The modules of conformance tests beside this one."""


def list_tests(path: Path) -> list[ast.FunctionDef]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def exists(file: str, name: str) -> bool:
    return (ROOT / file).is_file() and name in {test.name for test in list_tests(ROOT / file)}


def named_in_the_table() -> list[tuple[str, str]]:
    return NODE_ID.findall(TABLE.read_text(encoding="utf-8"))


def test_every_test_named_in_the_table_exists():
    named = named_in_the_table()
    assert named
    assert [f"{file}::{name}" for file, name in named if not exists(file, name)] == []


def test_every_row_of_the_table_names_a_test():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    bare = [row for row in rows if not NODE_ID.search(row) and not row.startswith("| Detail |")]
    assert rows
    assert bare == []


def test_every_conformance_test_is_in_the_table():
    named = set(named_in_the_table())
    held = {(path.relative_to(ROOT).as_posix(), test.name) for path in OTHERS for test in list_tests(path)}
    assert sorted(held - named) == []


def test_every_conformance_test_says_in_words_what_it_holds():
    silent = [
        f"{path.name}::{t.name}" for path in OTHERS for t in list_tests(path) if not ast.get_docstring(t)
    ]
    assert silent == []


def calls_of(folder: Path) -> set[str]:
    """The names of the functions that a folder calls, or hands to another to be called."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in folder.rglob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    functions = [function for call in calls for function in (call.func, *call.args[:1])]
    return {getattr(function, "id", getattr(function, "attr", "")) for function in functions}


def test_every_function_that_is_judged_is_one_that_the_product_calls():
    rows = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    cells = [row.split(" | ")[2] for row in rows]
    judged = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    for path in OTHERS:
        judged |= set(re.findall(r"\b(?:maths|forward)\.(\w+)\(", path.read_text(encoding="utf-8")))
    assert len(judged) > 20
    assert sorted(judged - calls_of(ROOT / "src" / "dovetail")) == []
