import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dovetail.cli.chat import Conversation, Message, Terminal, converse
from dovetail.errors import DovetailError, GenerationError


class Echo:
    """Says back the last question; one token a word, and one for each role."""

    context = 24
    max_new_tokens = 8

    def __init__(self) -> None:
        self.prompts: list[list[Message]] = []

    def num_tokens(self, messages: Sequence[Message]) -> int:
        return sum(1 + len(message["content"].split()) for message in messages)

    def speak(self, messages: Sequence[Message], *, turn: int, on_text: Callable[[str], None]) -> str:
        self.prompts.append(list(messages))
        question = messages[-1]["content"]
        if question == "interrupt":
            raise KeyboardInterrupt
        on_text("You said: ")
        on_text(question)
        return f"You said: {question}"


def talk(*lines: str, conversation: Conversation | None = None) -> tuple[str, Conversation]:
    """What the terminal shows when these lines are typed."""
    conversation = conversation or Conversation(Echo())
    typed, shown = iter(lines), list[str]()

    def read(prompt: str) -> str:
        shown.append(prompt)
        line = next(typed, None)
        if line is None:
            raise EOFError
        return line

    converse(conversation, Terminal(read, shown.append))
    return "".join(shown), conversation


def test_questions_are_answered_with_what_was_said_before() -> None:
    shown, conversation = talk("one", "two")
    assert "Human: Assistant: You said: one\nHuman: Assistant: You said: two\n" in shown
    assert [m["content"] for m in conversation.messages()] == ["one", "You said: one", "two", "You said: two"]
    assert [m["role"] for m in conversation.messages()] == ["user", "assistant"] * 2


def test_undo_takes_back_one_exchange() -> None:
    shown, conversation = talk("one", "two", "/undo")
    assert conversation.messages()[-1]["content"] == "You said: one"
    assert "(taken back)" in shown


def test_undo_of_the_first_exchange_and_of_nothing() -> None:
    shown, conversation = talk("one", "/undo", "/undo")
    assert conversation.messages() == []
    assert shown.count("(taken back)") == 1
    assert shown.count("(nothing to take back)") == 1


def test_reset_forgets_all_but_the_system_prompt() -> None:
    _, conversation = talk("/system be brief", "one", "/reset")
    assert conversation.messages() == [{"role": "system", "content": "be brief"}]


def test_the_system_prompt_stands_before_every_question() -> None:
    speaker = Echo()
    talk("one", "two", conversation=Conversation(speaker, system="be kind"))
    assert [prompt[0]["content"] for prompt in speaker.prompts] == ["be kind", "be kind"]


def test_a_saved_conversation_is_a_row_that_training_can_read(tmp_path: Path) -> None:
    file = tmp_path / "new" / "saved.jsonl"
    talk("one", f"/save {file}", "two", f"/save {file}")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(row["messages"]) for row in rows] == [2, 4]
    assert rows[1]["messages"][2] == {"role": "user", "content": "two"}


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown, _ = talk("one", f"/save {tmp_path}/file/x.jsonl", "two")
    assert "cannot be written" in shown
    assert "You said: two" in shown


def test_help_lists_the_commands_and_unknown_ones_are_told() -> None:
    shown, conversation = talk("/help", "/sing", "/save", "", "   ")
    for command in ("/reset", "/undo", "/system", "/save", "/quit"):
        assert command in shown
    assert "unknown command /sing" in shown
    assert "say where" in shown
    assert conversation.messages() == []


def test_quit_leaves_at_once() -> None:
    shown, _ = talk("/quit", "one")
    assert "You said" not in shown


def test_an_interrupted_answer_takes_its_question_back_and_the_talk_goes_on() -> None:
    shown, conversation = talk("one", "interrupt", "two")
    assert "stopped" in shown
    assert [m["content"] for m in conversation.messages() if m["role"] == "user"] == ["one", "two"]


def test_a_long_conversation_leaves_out_whole_exchanges_and_says_so_once() -> None:
    speaker = Echo()
    shown, conversation = talk("a b c", "d e f", "g h", "i", conversation=Conversation(speaker))
    assert shown.count("its first 2 messages are left out") == 1
    assert "Assistant: (" not in shown
    for prompt in speaker.prompts:
        assert prompt[0]["role"] == "user"
        assert speaker.num_tokens(prompt) <= speaker.context - speaker.max_new_tokens
    assert speaker.prompts[-1][-1]["content"] == "i"
    assert len(conversation.messages()) == 8  # what the model no longer sees is still there to save


def test_the_system_prompt_is_never_left_out() -> None:
    speaker = Echo()
    talk("a b", "c d", "e f", conversation=Conversation(speaker, system="s"))
    assert all(prompt[0]["role"] == "system" for prompt in speaker.prompts)


def test_a_question_longer_than_the_context_is_refused_and_forgotten() -> None:
    conversation = Conversation(Echo())
    with pytest.raises(GenerationError, match=r"more than the model's context of 24") as caught:
        conversation.ask(" ".join("x" * 20), lambda text: None, lambda note: None)
    assert isinstance(caught.value, DovetailError)
    assert conversation.messages() == []


def test_after_undo_and_trimming_the_count_of_left_out_messages_stays_true() -> None:
    _, conversation = talk("a b c", "d e f", "g h", "/undo", "/undo", "/undo")
    assert conversation.num_forgotten == 0
    assert conversation.messages() == []
