"""Docstrings are sentences that a reader from another country understands: they begin with a verb or a noun phrase."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "dovetail"
FRAGMENTS = {
    *("As", "At", "Between", "By", "For", "From", "How", "In", "Of", "On", "To", "What", "When", "Where"),
    *("Which", "Who", "Whoever", "Whose", "With", "Within", "Nobody", "Somebody", "Everybody", "Whether"),
}
"""First words of sentences without a subject. A boolean field says "True if ...", a function "Return whether ..."."""


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of all docstrings, those of fields included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text
        if isinstance(node, ast.Module | ast.ClassDef):
            for field, after in zip(node.body, node.body[1:], strict=False):
                is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if (
                    isinstance(field, ast.AnnAssign | ast.Assign)
                    and is_text
                    and isinstance(after.value.value, str)
                ):
                    yield after.lineno, after.value.value


def test_no_docstring_begins_without_a_subject_or_a_verb() -> None:
    found = [
        f"{file.relative_to(SOURCE)}:{line}: {text.splitlines()[0]}"
        for file in files()
        for line, text in docstrings(ast.parse(file.read_text(encoding="utf-8")))
        if text.split()[0].strip("`,.:") in FRAGMENTS
    ]
    assert found == []


def test_the_docstrings_of_functions_are_imperative_and_end_like_sentences() -> None:
    paths = [str(file) for file in files()]
    command = [sys.executable, "-m", "ruff", "check", "--select", "D401,D415", "--output-format", "concise"]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
