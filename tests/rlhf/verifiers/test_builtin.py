"""The verdicts of built-in verifiers beside those of plain Python."""

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovetail.rlhf.verifiers.builtin import code, exact, json_schema, last_number, maths, number, regex

WHOLE = st.integers(min_value=-(10**9), max_value=10**9)
AROUND = [
    ("", ""),
    ("So 3 times 7 is ", "."),
    ("x = ", " apples"),
    ("2. The answer is **", "**"),
    ("$", "$"),
    ("=", "\n"),
]


@given(
    WHOLE,
    st.sampled_from(AROUND),
    st.sampled_from(["{}", "{:,}", "{}.0", "{}.", "\\boxed{{{}}}", "{}%", "+{}"]),
)
def test_a_whole_number_is_read_as_it_was_written(value: int, around: tuple[str, str], form: str) -> None:
    text = form.format(value).replace("+-", "-")
    assert last_number(f"{around[0]}{text}{around[1]}") == value


@given(WHOLE, st.integers(min_value=1, max_value=10**6))
def test_a_fraction_is_read_as_it_was_written(above: int, below: int) -> None:
    expected = Fraction(above, below)
    for form in (
        "{}/{}",
        "\\frac{{{}}}{{{}}}",
        "it is \\dfrac{{{}}}{{{}}}.",
        "\\boxed{{\\frac{{{}}}{{{}}}}} and 7",
    ):
        assert last_number(form.format(above, below)) == expected


@given(st.decimals(min_value=-(10**6), max_value=10**6, places=4))
def test_a_decimal_is_read_exactly(value: Any) -> None:
    assert last_number(f"about {value}") == Fraction(str(value))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", None),
        ("abc12", None),
        ("5-3", 3),
        ("(5)-3", 3),
        ("\N{MINUS SIGN}7", -7),
        ("1.5e3", 1500),
        ("page 3, 4", 4),
        ("10/0", 0),
        ("1e999999999", 1),  # no exponent of nine digits is expanded
        ("\\boxed{12} or 13", 12),
        ("\\boxed{\\text{about } 12} or 13", 12),
        ("\\boxed{12 or 13", 13),
        ("9" * 5000, None),
    ],
)
def test_the_last_number_of_a_text(text: str, expected: int | None) -> None:
    assert last_number(text) == expected


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("He pays 18 dollars.", "16 - 3 - 4 = 9\n9 * 2 = 18\n#### 18", 1.0),
        ("He pays $1,800.00", 1800, 1.0),
        ("0.5", "\\frac{1}{2}", 1.0),
        ("17", "18", 0.0),
        ("I do not know", 18, 0.0),
        ("0.3333", "1/3", 0.0),
    ],
)
def test_numbers(completion: str, answer: Any, verdict: float) -> None:
    assert number(completion, answer) == verdict


def test_a_row_without_a_number_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="no number in the column answer: 'many'"):
        number("3", "many")


@pytest.mark.parametrize(
    ("completion", "verdict"), [("Paris", 1.0), (" Paris\n", 1.0), ("paris", 0.0), ("Paris.", 0.0), ("", 0.0)]
)
def test_exact(completion: str, verdict: float) -> None:
    assert exact(completion, "Paris ") == verdict


def test_regex() -> None:
    assert regex("the answer: 12", r"answer:\s*\d+$") == 1.0
    assert regex("the answer: none", r"answer:\s*\d+$") == 0.0


@pytest.mark.parametrize(
    ("completion", "answer", "verdict"),
    [
        ("so $(x+1)^2$", "x^2 + 2x + 1", 1.0),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{\\sqrt{2}}{2}", 1.0),
        ("The answer is 0.5.", "$\\frac12$", 1.0),
        ("It is 42", "6 * 7 = 42\n#### 42", 1.0),
        ("so $(x-1)^2$", "x^2 + 2x + 1", 0.0),
        ("I do not know", "3", 0.0),
    ],
)
def test_mathematics(completion: str, answer: str, verdict: float) -> None:
    pytest.importorskip("math_verify")
    assert maths(completion, answer) == verdict


def test_mathematics_needs_an_answer() -> None:
    pytest.importorskip("math_verify")
    with pytest.raises(ValueError, match="no mathematical expression in the column answer"):
        maths("3", "")


PERSON = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ('{"age": 3}', 1.0),
        ('Here:\n```json\n{"age": 3}\n```\nDone.', 1.0),
        ('{"age": "3"}', 0.0),
        ('{"age": NaN}', 0.0),
        ('{"age": 3', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
@pytest.mark.parametrize(
    "schema", [PERSON, '{"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}']
)
def test_json_schema(completion: str, verdict: float, schema: Any) -> None:
    pytest.importorskip("jsonschema")
    assert json_schema(completion, schema) == verdict


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "http://127.0.0.1:9/a.json"}, "{"])
def test_a_schema_that_is_none_or_elsewhere_cannot_be_used(schema: Any) -> None:
    pytest.importorskip("jsonschema")
    with pytest.raises(Exception, match=r"nonsense|Unresolvable|Expecting"):
        json_schema("{}", schema)


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("Sure!\n```python\ndef f(x):\n    return x + 1\n```\nThat is it.", 1.0),
        ("def f(x):\n    return x + 1", 1.0),
        ("```python\ndef f(x):\n    return x\n```", 0.0),
        ("I cannot.", 0.0),
    ],
)
@pytest.mark.parametrize(
    "tests", ["assert f(1) == 2", ["assert f(1) == 2", "for i in range(3):\n    assert f(i) > i"]]
)
def test_code(completion: str, verdict: float, tests: Any) -> None:
    assert code(completion, tests) == verdict


@pytest.mark.parametrize("tests", ["", [], [""], [3]])
def test_a_row_without_tests_cannot_be_used(tests: Any) -> None:
    with pytest.raises(ValueError, match="the column tests holds no Python code"):
        code("x = 1", tests)
