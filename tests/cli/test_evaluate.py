"""`dovetail eval`: tables, JSON, a page, and mistakes."""

import json
from pathlib import Path

import pytest

from dovetail.cli.evaluate import cells, show
from dovetail.cli.main import main
from dovetail.model.load import save_model
from dovetail.serving.inference.comparison import Result
from tests.fakes import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    for name, seed in (("one", 0), ("two", 1)):
        save_model(tiny_model(seed=seed), byte_tokenizer(), folder / name)
    (folder / "sums.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2", "answer": "3"}\n')
    return folder


def command(folder: Path, *more: str) -> None:
    models = [str(folder / name) for name in ("one", "two")]
    main(["eval", *models, "--max-new-tokens", "4", "--device", "cpu", *more])


def test_the_figures_are_json_or_tables_and_a_page(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(
            folder, "--task", f"number={folder}/sums.jsonl", "--json", "--page", str(tmp_path / "page.md")
        )
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    one = str(folder / "one")
    assert found["models"][one] == one
    (task,) = found["tasks"]
    assert (task["task"], task["rows"]) == (f"number={folder}/sums.jsonl", 2)
    assert set(task["figures"][one]) == {"accuracy", "accuracy_low", "accuracy_high"}
    page = (tmp_path / "page.md").read_text()
    assert f"|  | {one} | {folder / 'two'} |\n| --- | --- | --- |\n| accuracy | " in page


def test_a_figure_stands_with_its_error_or_interval() -> None:
    figures = {
        "sft": {"reward": 0.5, "reward_stderr": 0.125, "answer_tokens": 12.34},
        "ppo": {"reward": 1.0, "reward_stderr": 0.25, "wins": 0.75, "wins_low": 0.6, "wins_high": 0.9},
    }
    assert list(cells(figures)) == [
        ["", "sft", "ppo"],
        ["reward", "0.500 ± 0.125", "1.000 ± 0.250"],
        ["wins", "-", "0.750 [0.60, 0.90]"],
        ["answer tokens", "12.3", "-"],
    ]


def test_figures_keep_their_names_beside_many_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    own = {"reward_wins": 0.5, "reward_wins_low": 0.4, "reward_wins_high": 0.6, "answer_tokens": 3.0}
    show([Result("prompts", 9, {f"runs/a/long/name/of/model-{i}": own for i in range(6)})])
    shown = capsys.readouterr().out
    assert "prompts, 9 rows" in shown
    assert "reward wins" in shown
    assert "answer tokens" in shown


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "numbr=x.jsonl"], "'numbr' is not a kind of task"),
        (["--task", "missing.jsonl"], "missing.jsonl: there is no such file"),
        ([], "there is nothing to compare on"),
    ],
)
def test_mistakes_are_messages(
    folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(folder, *more)
    assert ended.value.code == 2
    captured = capsys.readouterr().err
    assert message in captured
    assert "hint: " in captured


def test_a_judge_needs_two_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "eval",
                str(folder / "one"),
                "--task",
                str(folder / "sums.jsonl"),
                "--judge",
                "http://127.0.0.1:9/v1",
            ]
        )
    assert ended.value.code == 2
    assert "--judge compares the answers of two models" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_a_message(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        command(folder, "--task", f"number={folder}/sums.jsonl", "--page", str(tmp_path / "no" / "page.md"))
    assert ended.value.code == 2
    assert "page.md cannot be written" in capsys.readouterr().err
