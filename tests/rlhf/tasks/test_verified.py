"""Accuracy and pass@k of tasks with right and wrong answers."""

from pathlib import Path

import pytest

from dovetail.errors import ConfigError, DataError
from dovetail.maths.evaluation import wilson_interval
from dovetail.rlhf.tasks.named import load_task, parse_task
from dovetail.rlhf.tasks.subject import Drawing
from tests.rlhf.tasks.asked import say_instead, subject


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f'{{"question": "{n}+{n}", "answer": "#### {2 * n}"}}\n' for n in range(1, 5)))
    return file


def test_accuracy_is_of_greedy_answers_with_its_interval(monkeypatch: pytest.MonkeyPatch, sums: Path) -> None:
    draws = say_instead(monkeypatch, lambda _, text: "It is 4." if text != "3+3" else "6")
    found = load_task(parse_task(f"number={sums}"), Drawing(max_new_tokens=9), limit=10)(subject())
    low, high = wilson_interval(2, 4)
    assert found == {"accuracy": 0.5, "accuracy_low": low, "accuracy_high": high}
    assert (draws[0].temperature, draws[0].max_new_tokens) == (0.0, 9)


def test_several_samples_give_pass_at_k(monkeypatch: pytest.MonkeyPatch, sums: Path) -> None:
    """The answers to 1+1 are right in one of three draws, those to 2+2 always, the others never."""
    draws = say_instead(
        monkeypatch, lambda i, text: {"1+1": "2" if i % 3 == 0 else "", "2+2": "4"}.get(text, "")
    )
    drawing = Drawing(max_new_tokens=9, samples=3, temperature=0.7)
    found = load_task(parse_task(f"number={sums}"), drawing, limit=10)(subject())
    shares = {name: value for name, value in found.items() if not name.endswith("stderr")}
    assert shares == pytest.approx(
        {"pass_at_1": (1 / 3 + 1) / 4, "pass_at_2": (2 / 3 + 1) / 4, "pass_at_3": 2 / 4}
    )
    assert draws[0].temperature == 0.7


def test_a_function_of_the_user_s_decides_too(
    monkeypatch: pytest.MonkeyPatch, sums: Path, tmp_path: Path
) -> None:
    code = tmp_path / "mine.py"
    code.write_text("def short(completion):\n    return len(completion) < 3\n")
    say_instead(monkeypatch, lambda _, text: "long" if text == "1+1" else "ok")
    found = load_task(parse_task(f"{code}:short={sums}"), Drawing(max_new_tokens=9), limit=10)(subject())
    assert found["accuracy"] == 0.75


def test_a_file_without_the_verifier_s_column_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "1+1", "result": 2}\n')
    say_instead(monkeypatch, lambda *_: "2")
    task = load_task(parse_task(f"number={file}"), Drawing(max_new_tokens=9), limit=10)
    with pytest.raises(ConfigError, match=r"the task number=.*p.jsonl: .* needs the column answer") as caught:
        task(subject())
    assert "it has result" in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [("sqad=x.jsonl", "'sqad' is not a kind of task"), ("numbr=x.jsonl", "'numbr' is not a kind of task")],
)
def test_an_unknown_kind_is_refused_with_the_nearest(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_task(text)
    assert "did you mean" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ["squad", "number", "text"])
def test_a_file_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl: there is no such file"):
        load_task(parse_task(f"{kind}={tmp_path}/missing.jsonl"), Drawing(max_new_tokens=9), limit=10)
