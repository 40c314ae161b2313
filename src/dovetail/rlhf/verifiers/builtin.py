"""Built-in verifiers: functions that compare one answer with what its data row says, 1 = right and 0 = wrong.

Responsible for: numbers, mathematics, texts, patterns, JSON schemas and tests of programs. An error says that the row,
not the answer, cannot be used.
Not responsible for: processes and time limits (pool.py, code_tests.py), what a wrong answer costs.

Each function is `verifier(completion, column, ...)`: the names of its other parameters are names of the row's columns.
Imports nothing heavy: every worker process loads this file.
"""

import json
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from typing import Any

from dovetail.rlhf.verifiers.code_tests import passes_tests

_BOXED = re.compile(r"\\boxed\s*\{")
_FENCED = re.compile(r"```[^\n`]*\n(.*?)```", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*([^{}]+?)\s*\}\s*\{\s*([^{}]+?)\s*\}")
_NUMBER = re.compile(
    r"""(?<![\w.])(?:(?<![)\]])[-+])?            # a sign, unless it stands behind a value
    (?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+   # 1,234.5 or 12.5 or .5
    """,
    re.VERBOSE,
)
_EXPONENT = re.compile(r"[eE][-+]?\d{1,3}(?!\d)")
_OVER = re.compile(r"\s*/\s*(\d+)(?![\d.,]*\d*[.,]\d)")


def number(completion: str, answer: Any) -> float:
    """Return 1 if the last number of the completion equals the last number of `answer`.

    Where a text holds \\boxed{...}, its last one counts alone. Numbers are compared exactly: 0.5, 1/2, .50 and
    \\frac{1}{2} are equal, and 1,000 is 1000.
    """
    wanted = last_number(str(answer))
    if wanted is None:
        raise ValueError(f"there is no number in the column answer: {str(answer)[:80]!r}")
    return float(last_number(completion) == wanted)


def maths(completion: str, answer: Any) -> float:
    """Return 1 if the completion's final expression is mathematically equal to `answer`, by the math-verify library."""
    from math_verify import parse, verify

    text = str(answer).rsplit("####", 1)[-1].strip()
    marked = text if "$" in text or "\\boxed" in text or "\\(" in text or "\\[" in text else f"${text}$"
    # Its own time limits need signals; a worker process that takes too long is ended instead.
    wanted = parse(marked, parsing_timeout=None)
    if not wanted:
        raise ValueError(f"there is no mathematical expression in the column answer: {text[:80]!r}")
    return float(verify(wanted, parse(completion, parsing_timeout=None), timeout_seconds=None))


def exact(completion: str, answer: Any) -> float:
    """Return 1 if the completion is `answer`, letter by letter, without the white space around both."""
    return float(completion.strip() == str(answer).strip())


def regex(completion: str, pattern: str) -> float:
    """Return 1 if the regular expression `pattern` matches somewhere in the completion."""
    return float(re.search(pattern, completion) is not None)


def json_schema(completion: str, schema: Any) -> float:
    """Return 1 if the completion, or its last fenced block, is JSON that `schema` allows; schemas are never fetched."""
    from jsonschema.validators import validator_for
    from referencing import Registry

    wanted = json.loads(schema) if isinstance(schema, str) else schema
    kind = validator_for(wanted)
    kind.check_schema(wanted)
    try:
        value = json.loads(last_block(completion), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(kind(wanted, registry=Registry()).is_valid(value))


def code(completion: str, tests: Any) -> float:
    """Return 1 if the Python program in the completion, or its last fenced block, passes all `tests`.

    tests: Python code, or a list of pieces of it, that sees the names of the program.
    """
    given = [tests] if isinstance(tests, str) else list(tests)
    if not given or not all(isinstance(test, str) and test.strip() for test in given):
        raise ValueError("the column tests holds no Python code")
    if not _runs_programs():
        raise OSError("this machine cannot run programs within limits")
    return float(passes_tests(last_block(completion), given))


@cache
def _runs_programs() -> bool:
    """Return whether an empty program passes; where a limit cannot be set, all others would fail without a reason."""
    return passes_tests("", ["assert True"])


VERIFIERS: Mapping[str, Callable[..., float]] = {
    "code": code,
    "exact": exact,
    "json_schema": json_schema,
    "maths": maths,
    "number": number,
    "regex": regex,
}
NEEDS: Mapping[str, tuple[str, ...]] = {"maths": ("math_verify",), "json_schema": ("jsonschema",)}
"""Modules that are not installed with the package itself, by the verifier that needs them."""


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, of its last \\boxed{...} where there is one; None if there is none."""
    inside = last_boxed(text)
    plain = _FRACTION.sub(r"\1/\2", text if inside is None else inside)
    plain = plain.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    found: Fraction | None = None
    position = 0
    while (match := _NUMBER.search(plain, position)) is not None:
        found, position = _value_at(plain, match)
    return found


def _value_at(text: str, match: "re.Match[str]") -> tuple[Fraction | None, int]:
    """Return the number that begins with a match, with its exponent or denominator, and where it ends."""
    digits, end = match[0].replace(",", ""), match.end()
    if exponent := _EXPONENT.match(text, end):
        digits, end = digits + exponent[0], exponent.end()
    try:
        value = Fraction(digits)
        if (over := _OVER.match(text, end)) and int(over[1]):
            value, end = value / int(over[1]), over.end(1)
    except ValueError:  # more digits than Python reads
        return None, end
    return value, end


def last_boxed(text: str) -> str | None:
    """Return the content of the last \\boxed{...} whose brackets close."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += (text[position] == "{") - (text[position] == "}")
            if depth == 0:
                return text[match.end() : position]
    return None


def last_block(text: str) -> str:
    """Return the content of the last fenced block, or the whole text where there is none."""
    blocks: list[str] = _FENCED.findall(text)
    return blocks[-1] if blocks else text


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
