from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dovetail.config.data import SourceConfig
from dovetail.data.preview import preview
from dovetail.text.chat_format import ChatFormat
from tests.data.files import assistant, config, pairs, user, write_jsonl
from tests.text.tokenizers import CHATML, byte_level

CHAT = ChatFormat(byte_level(CHATML))


def printed(things: list[Any], **console: Any) -> str:
    out = io.StringIO()
    Console(file=out, soft_wrap=True, **console).print(*things)
    return out.getvalue()


def shown(tmp_path: Path, row: dict[str, Any], stage: Any, **changes: Any) -> str:
    name = "pretraining" if stage == "text" else "blend"
    stages = None if stage == "text" else (stage,)
    source = SourceConfig(path=write_jsonl(tmp_path / "a.jsonl", [row]), held_out=False, stages=stages)
    return printed(preview(config(tmp_path, **{name: (source,)}, **changes), CHAT, stage))


def test_a_demonstration_marks_every_answer(tmp_path: Path) -> None:
    turns = [user("hi [bold]"), assistant("hello"), user("how?"), assistant("well")]
    text = shown(tmp_path, {"messages": turns}, "sft")
    assert (
        "<|im_start|>user\nhi [bold]<|im_end|>\n<|im_start|>assistant\n[[hello<|im_end|>]]\n"
        "<|im_start|>user\nhow?<|im_end|>\n<|im_start|>assistant\n[[well<|im_end|>]]\n"
    ) in text
    assert "1 rows read, 1 for this stage" in text
    ids, mask = CHAT.conversation(turns)  # type: ignore[arg-type]
    assert f"sft row 1 of 1, {tmp_path}/a.jsonl: {len(ids)} tokens, {sum(mask)} marked" in text


def test_a_comparison_shows_each_answer_and_what_it_is_better_than(tmp_path: Path) -> None:
    text = shown(tmp_path, pairs(1)[0], "reward")
    assert "answer 1 of 2, better than 2:" in text
    assert "[[bad 0<|im_end|>]]" in text


def test_a_prompt_marks_nothing(tmp_path: Path) -> None:
    text = shown(tmp_path, pairs(1)[0], "ppo")
    assert "<|im_start|>user\nq 0?<|im_end|>\n<|im_start|>assistant\n" in text
    assert "[[" not in text


@pytest.mark.parametrize("console", [{}, {"force_terminal": True, "color_system": None}])
def test_a_prompt_is_followed_by_the_columns_that_a_reward_function_gets(
    tmp_path: Path, console: dict[str, Any]
) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": "2+2?", "answer": "four, or 4", "tests": ["f(2) == 4"]}]
    )
    source = SourceConfig(path=path, held_out=False, stages=("ppo",))
    text = printed(preview(config(tmp_path, source), CHAT, "ppo"), **console)
    assert text.endswith('assistant\n\n  answer = "four, or 4"\n  tests = ["f(2) == 4"]\n\n')


def test_plain_text_is_marked_whole(tmp_path: Path) -> None:
    assert "[[once upon<|endoftext|>]]" in shown(tmp_path, {"text": "once upon"}, "text")


def test_rows_that_are_too_long_are_told(tmp_path: Path) -> None:
    assert "longer than 5: truncate_left" in shown(
        tmp_path, pairs(1)[0], "sft", max_tokens=5, too_long="truncate_left"
    )


def test_a_terminal_gets_colours_and_no_brackets(tmp_path: Path) -> None:
    things = preview(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", pairs(40))), CHAT, "sft", 1)
    text = printed(things, force_terminal=True, color_system="standard")
    assert "\x1b[32m" in text
    assert "[[" not in text


@pytest.mark.parametrize("count", [1, 3, 50])
def test_as_many_rows_as_asked_for_and_always_the_same(count: int, tmp_path: Path) -> None:
    rows = pairs(30)
    one = preview(config(tmp_path, write_jsonl(tmp_path / "a.jsonl", rows)), CHAT, "ppo", count)
    write_jsonl(tmp_path / "a.jsonl", rows[::-1])
    assert [str(thing) for thing in one] == [
        str(thing) for thing in preview(config(tmp_path, str(tmp_path / "a.jsonl")), CHAT, "ppo", count)
    ]
    assert len(one) - 1 == min(count, int(one[1].title.split(" of ")[1].split(",")[0]))  # type: ignore[union-attr]
