import pytest

from dovetail.config.yaml_source import read_yaml
from dovetail.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("9.65e-6", 9.65e-6),
        ("3", 3),
        ("-0.5", -0.5),
        (".5", 0.5),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("5:1", "5:1"),
        ("007", "007"),
        ("2026-01-31", "2026-01-31"),
        ("rm-static:2", "rm-static:2"),
        ("[rm-static:2, ./my_pairs.jsonl:1]", ["rm-static:2", "./my_pairs.jsonl:1"]),
        ("{path: a b, weight: 2}", {"path": "a b", "weight": 2}),
        ("'3'", "3"),
        ("", None),
    ],
)
def test_scalars_are_what_a_reader_of_the_text_expects(text: str, value: object) -> None:
    found = read_yaml(text, "here").values
    assert found == value
    assert type(found) is type(value)


def test_each_value_remembers_its_line() -> None:
    lines = read_yaml("a:\n  b: 1\nc:\n  - x\n  - y: 2\n", "here").lines
    assert lines["a",] == 1
    assert lines["a", "b"] == 2
    assert lines["c", 0] == 4
    assert lines["c", 1, "y"] == 5


def test_a_syntax_error_names_file_and_line() -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml line \d: not valid YAML"):
        read_yaml("a: 1\nb: [1,\nc: 2\n", "my.yaml")


def test_a_doubled_key_names_both_lines() -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml line 3: a is given twice, first on line 1"):
        read_yaml("a: 1\nb: 2\na: 3\n", "my.yaml")


def test_control_characters_are_refused_with_a_way_out() -> None:
    with pytest.raises(ConfigError, match="UTF-8"):
        read_yaml("a: \x00", "my.yaml")


@pytest.mark.parametrize(
    "text", ["!!int x", "!!float x", "!!bool x", "!!timestamp x", "!!timestamp 2026-13-45"]
)
def test_a_value_that_is_not_what_it_is_marked_as_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml: a value is not what it is marked as, or too long"):
        read_yaml(text, "my.yaml")


@pytest.mark.parametrize("text", ["&x [*x]", "[" * 5000])
def test_a_value_without_end_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"my\.yaml: a value contains itself, or is nested too deeply"):
        read_yaml(text, "my.yaml")
