"""Files of answers against the engine: whole, resumed, and never a mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dovetail.cli.main import main
from dovetail.errors import DataError
from dovetail.model.load import save_model
from dovetail.serving.inference.answer_file import AnswerFile
from dovetail.serving.inference.prompt_file import read_prompts
from tests.fakes import byte_tokenizer, tiny_model
from tests.serving.inference.drawing import drawn

SETTINGS = {"model": "a", "temperature": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(), byte_tokenizer(), folder)
    return folder


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def written(file: Path, *lines: Any) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def generate(folder: Path, prompts: Path, output: Path, *more: str) -> int:
    arguments = ["generate", str(folder), "--prompts", str(prompts), f"--output={output}", "--top-p", "1"]
    arguments += ["--temperature", "1", "--max-new-tokens", "12", "--seed", "7", "--device", "cpu", *more]
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def test_a_file_is_answered_in_order_and_resumed_to_the_same_answers(folder: Path, tmp_path: Path) -> None:
    prompts = written(
        tmp_path / "in.jsonl",
        *({"id": f"row {number}", "prompt": f"a\u2028 {number}"} for number in range(6)),
        {"messages": [{"role": "user", "content": "b"}], "id": "last"},
    )
    output = tmp_path / "new" / "out.jsonl"
    assert generate(folder, prompts, output) == 0
    whole = rows(output)
    assert [row["id"] for row in whole] == [*(f"row {number}" for number in range(6)), "last"]
    for index, row in enumerate(whole):
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        assert row["answer"] == drawn(messages, 7 + index)
        assert row["finish_reason"] in ("stop", "length")
    content = output.read_bytes()
    torn = content[: content.index(b"\n", len(content) // 2) + 9]  # some lines, and the beginning of another
    output.write_bytes(torn)
    assert generate(folder, prompts, output) == 0
    assert output.read_bytes() == content
    assert generate(folder, prompts, output) == 0
    assert output.read_bytes() == content


def test_answers_to_other_prompts_are_not_added_to(folder: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    output = written(tmp_path / "out.jsonl", {"prompt": "c", "answer": "d", "finish_reason": "stop"})
    with pytest.raises(DataError, match="line 1: no answer to prompt 1") as caught:
        AnswerFile(output, read_prompts(prompts), SETTINGS)
    assert "another --output" in str(caught.value.hint)
    written(output, *({"prompt": "a"} for _ in range(3)))
    with pytest.raises(DataError, match="has 3 answers, and there are 2 prompts"):
        AnswerFile(output, read_prompts(prompts), SETTINGS)


def test_lines_are_written_when_those_before_them_are(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "in.jsonl", *({"prompt": str(number)} for number in range(3))))
    output = tmp_path / "out.jsonl"
    with AnswerFile(output, prompts, SETTINGS) as answers:
        answers.add(1, "one", "stop")
        assert rows(output) == []
        answers.add(0, "zero", "stop")
        assert [row["answer"] for row in rows(output)] == ["zero", "one"]


def cut(file: Path, *, lines: int) -> bytes:
    """Leave the first lines, as a kill would."""
    content = b"".join(file.read_bytes().splitlines(keepends=True)[:lines])
    file.write_bytes(content)
    return content


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--temperature", "0.5"], "temperature 1.0 and now 0.5"),
        (["--max-new-tokens", "9"], "max_new_tokens 12 and now 9"),
        (["--seed", "8"], "seed 7 and now 8"),
        (["--system", "be kind"], 'system null and now "be kind"'),
        (["--top-p", "0.9", "--seed", "1"], "top_p 1.0 and now 0.9, seed 7 and now 1"),
    ],
)
def test_answers_drawn_with_other_settings_are_not_added_to(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    prompts, output = written(tmp_path / "in.jsonl", *({"prompt": p} for p in "abc")), tmp_path / "out.jsonl"
    assert generate(folder, prompts, output) == 0
    content = cut(output, lines=2)
    assert generate(folder, prompts, output, *more) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"has 2 answers that were drawn with {says}" in said
    assert "another --output" in said
    assert output.read_bytes() == content


def test_answers_of_another_model_in_the_same_place_are_not_added_to(folder: Path, tmp_path: Path) -> None:
    prompts, output = written(tmp_path / "in.jsonl", *({"prompt": p} for p in "abc")), tmp_path / "out.jsonl"
    save_model(tiny_model(), byte_tokenizer(), tmp_path / "model")
    assert generate(tmp_path / "model", prompts, output) == 0
    whole = output.read_bytes()
    save_model(tiny_model(seed=1), byte_tokenizer(), tmp_path / "retrained")
    (tmp_path / "model").rename(tmp_path / "before")
    (tmp_path / "retrained").rename(tmp_path / "model")
    assert generate(tmp_path / "model", prompts, output) == 2, "a finished file of another model is no answer"
    cut(output, lines=1)
    assert generate(tmp_path / "model", prompts, output) == 2
    assert generate(folder, prompts, output) == 0, "the same weights elsewhere go on"
    assert output.read_bytes() == whole


def test_answers_without_a_record_of_what_wrote_them_are_not_added_to(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"}))
    output = written(tmp_path / "out.jsonl", {"prompt": "a", "answer": "d", "finish_reason": "stop"})
    with pytest.raises(DataError, match=r"has 1 answers, and .*out\.jsonl\.settings\.json does not say"):
        AnswerFile(output, prompts, SETTINGS)
    (tmp_path / "out.jsonl.settings.json").write_text("[")
    with pytest.raises(DataError, match="does not say what wrote them"):
        AnswerFile(output, prompts, SETTINGS)
    output.unlink()
    with AnswerFile(output, prompts, SETTINGS) as answers:
        answers.add(0, "new", "stop")
    with AnswerFile(output, prompts, SETTINGS) as answers:
        assert answers.num_done == 1


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    prompts = read_prompts(written(tmp_path / "in.jsonl", {"prompt": "a"}))
    with (
        AnswerFile(tmp_path / "out.jsonl", prompts, SETTINGS),
        pytest.raises(DataError, match="is being written by another process"),
    ):
        AnswerFile(tmp_path / "out.jsonl", prompts, SETTINGS)
    with AnswerFile(tmp_path / "out.jsonl", prompts, SETTINGS) as answers:
        assert answers.num_done == 0


REFUSES_ROBOTS = (
    "{% for m in messages %}{% if 'robot' in m.content %}{{ raise_exception('no robots') }}{% endif %}"
    "{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("row", "template", "says"),
    [
        ("x" * 600, None, "line 3: the prompt has 621 tokens, the model's context is 512"),
        (
            "a robot",
            REFUSES_ROBOTS,
            "line 3: the chat template refuses a conversation of the turns user: no robots",
        ),
    ],
)
def test_a_row_that_the_model_refuses_is_named_and_can_be_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: str, template: str | None, says: str
) -> None:
    save_model(tiny_model(), byte_tokenizer(template), tmp_path / "model")
    prompts, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n\n' for text in ("a", row, "b")))
    assert generate(tmp_path / "model", prompts, output) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"{prompts}, {says}" in said
    assert "--skip-refused" in said
    assert rows(output) == []
    assert generate(tmp_path / "model", prompts, output, "--skip-refused") == 0
    assert [one["finish_reason"] == "refused" for one in rows(output)] == [False, True, False]
    assert [one["answer"] is None for one in rows(output)] == [False, True, False]
    if template is None:
        assert rows(output)[2]["answer"] == drawn([{"role": "user", "content": "b"}], 7 + 2)


def test_a_tilde_is_the_home_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path / "in.jsonl", {"prompt": "a"})
    assert generate(folder, Path("~/in.jsonl"), Path("~/new/out.jsonl")) == 0
    assert len(rows(tmp_path / "new" / "out.jsonl")) == 1
