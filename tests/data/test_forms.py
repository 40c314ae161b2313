from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from dovetail.config.data import SourceConfig
from dovetail.data.columns import BadRowError
from dovetail.data.forms import record_of
from dovetail.data.records import Comparison, Demonstration, Prompt, Record, Text
from tests.data.files import assistant, system, user


def read(row: dict[str, Any], **columns: Any) -> Record:
    return record_of(row, SourceConfig(path="t", **columns), "t")


def comparison(row: dict[str, Any], **columns: Any) -> Comparison:
    record = read(row, **columns)
    assert isinstance(record, Comparison)
    return record


def test_prompt_and_response_are_a_demonstration() -> None:
    record = read({"q": "2+2?", "a": "4", "s": "Be brief."}, prompt="q", response="a", system="s")
    assert isinstance(record, Demonstration)
    assert record.messages == (system("Be brief."), user("2+2?"), assistant("4"))


def test_an_absent_system_message_is_none() -> None:
    for row in ({"q": "a", "r": "b"}, {"q": "a", "r": "b", "s": None}, {"q": "a", "r": "b", "s": " "}):
        record = read(row, prompt="q", response="r", system="s")
        assert isinstance(record, Demonstration)
        assert record.messages == (user("a"), assistant("b"))


def test_messages_are_a_demonstration_up_to_the_last_answer() -> None:
    turns = [user("a"), assistant("b"), user("c"), assistant("d"), user("unanswered")]
    record = read({"m": turns}, messages="m")
    assert isinstance(record, Demonstration)
    assert record.messages == tuple(turns[:4])


def test_a_prompt_may_be_text_a_transcript_or_messages() -> None:
    turns = (user("a"), assistant("b"), user("c"))
    assert isinstance(read({"p": "a"}, prompt="p"), Prompt)
    for value, transcript in (
        (list(turns), False),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", True),
    ):
        record = read({"p": value}, prompt="p", transcript=transcript)
        assert isinstance(record, Prompt)
        assert record.messages == turns


@pytest.mark.parametrize(
    "text", ["[3, 1, 2]", '["a"]', "[]", '[{"name": "Ann"}]', '[{"role": "user", "content": "a"}, 3]']
)
def test_text_that_is_a_json_list_is_text(text: str) -> None:
    prompt = read({"p": text}, prompt="p")
    assert isinstance(prompt, Prompt)
    assert prompt.messages == (user(text),)
    answered = read({"p": "q", "r": text}, prompt="p", response="r")
    assert isinstance(answered, Demonstration)
    assert answered.messages == (user("q"), assistant(text))
    judged = comparison({"p": text, "x": text, "y": "b"}, prompt="p", chosen="x", rejected="y")
    assert (judged.messages, judged.answers) == ((user(text),), (text, "b"))


def test_text_that_is_a_json_list_of_messages_is_these() -> None:
    columns = {"x": json.dumps([user("a"), assistant("g")]), "y": json.dumps([user("a"), assistant("b")])}
    record = comparison({"p": "a", **columns}, prompt="p", chosen="x", rejected="y")
    assert (record.messages, record.answers) == ((user("a"),), ("g", "b"))
    prompt = read({"p": '[{"from": "human", "value": "a"}]'}, prompt="p")
    assert isinstance(prompt, Prompt)
    assert prompt.messages == (user("a"),)


def test_plain_text_is_text() -> None:
    record = read({"t": "once"}, text="t")
    assert isinstance(record, Text)
    assert record.text == "once"


PAIR = ((user("a"), assistant("b"), user("c")), ("good", "bad"), ((0, 1, 0.0),))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {
                "x": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: good",
                "y": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: bad",
            },
            {"transcript": True},
        ),
        (
            {
                "x": [user("a"), assistant("b"), user("c"), assistant("good")],
                "y": [user("a"), assistant("b"), user("c"), assistant("bad")],
            },
            {},
        ),
        (
            {"p": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "x": " good", "y": " bad"},
            {"prompt": "p", "transcript": True},
        ),
        ({"p": [user("a"), assistant("b"), user("c")], "x": "good", "y": "bad"}, {"prompt": "p"}),
        (
            {  # as UltraFeedback: the prompt is only the first turn, the lists hold everything
                "p": "a",
                "x": [user("a"), assistant("b"), user("c"), assistant("good")],
                "y": [user("a"), assistant("b"), user("c"), assistant("bad")],
            },
            {"prompt": "p"},
        ),
    ],
    ids=["transcripts", "message lists", "transcript prompt", "message prompt", "prompt beside lists"],
)
def test_chosen_and_rejected_in_every_form(row: dict[str, Any], columns: dict[str, Any]) -> None:
    record = comparison(row, chosen="x", rejected="y", **columns)
    assert (record.messages, record.answers, record.better_than) == PAIR


def test_all_forms_of_one_row_have_one_hash() -> None:
    lists = {"x": [user("a"), assistant("g")], "y": [user("a"), assistant("b")]}
    flat = {"p": "a", "x": "g", "y": "b"}
    first = comparison(lists, chosen="x", rejected="y")
    assert comparison(flat, chosen="x", rejected="y", prompt="p").row_id == first.row_id


def test_an_empty_rejected_answer_is_an_answer() -> None:
    whole = {"x": "\n\nHuman: a\n\nAssistant: b", "y": "\n\nHuman: a\n\nAssistant:"}
    assert comparison(whole, chosen="x", rejected="y", transcript=True).answers == ("b", "")


def test_equal_answers_are_a_tie() -> None:
    assert comparison({"p": "q", "x": "a", "y": "a"}, prompt="p", chosen="x", rejected="y").better_than == ()


def test_an_optional_rejected_answer_may_be_absent() -> None:
    record = comparison({"p": "q", "x": "a", "y": None}, prompt="p", chosen="x", rejected="y?")
    assert (record.answers, record.better_than) == (("a",), ())


def test_the_margin_goes_with_the_pair() -> None:
    row = {"p": "q", "x": "a", "y": "b", "m": 1.5}
    assert comparison(row, prompt="p", chosen="x", rejected="y", margin="m").better_than == ((0, 1, 1.5),)


@pytest.mark.parametrize(
    ("value", "pairs"),
    [
        (1, ((0, 1, 0.0),)),
        (2.0, ((1, 0, 0.0),)),
        ("2", ((1, 0, 0.0),)),
        (1.2, ((0, 1, 0.0),)),
        (1.9999, ((1, 0, 0.0),)),
        (1.5, ()),
        (0, ()),
        (0.0, ()),
        ("tie", ()),
    ],
)
def test_preferences_name_the_better_answer(value: Any, pairs: tuple[Any, ...]) -> None:
    row = {"p": "q", "a": "x", "b": "y", "w": value}
    assert comparison(row, prompt="p", answers=("a", "b"), preference="w").better_than == pairs


def test_preferences_may_have_other_values() -> None:
    row = {"p": "q", "a": "x", "b": "y"}
    shared: dict[str, Any] = {"prompt": "p", "answers": ("a", "b"), "preference": "w"}
    for first, second in ((1, 0), ("A", "B"), (True, False), (-1, 1)):
        columns = {**shared, "preference_values": (first, second)}
        assert comparison({**row, "w": first}, **columns).better_than == ((0, 1, 0.0),)
        assert comparison({**row, "w": second}, **columns).better_than == ((1, 0, 0.0),)
    both_bad = {**shared, "preference_values": ("A", "B"), "tie_values": ("both bad",)}
    assert comparison({**row, "w": "both bad"}, **both_bad).better_than == ()


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ({"scores": "s"}, {"s": [2, 0.5, 2]}),
        ({"ranks": "s"}, {"s": [1, 3, 1]}),
        ({"scores": ("s1", "s2", "s3")}, {"s1": "2", "s2": "0.5", "s3": "2"}),
    ],
)
def test_scores_and_ranks_make_pairs_of_all_that_differ(columns: Any, values: Any) -> None:
    record = comparison({"p": "q", "a": ["x", "y", "z"], **values}, prompt="p", answers="a", **columns)
    assert record.answers == ("x", "y", "z")
    assert set(record.better_than) == {(0, 1, 0.0), (2, 1, 0.0)}


def test_answers_may_be_nested() -> None:
    row = {"p": {"text": "q"}, "c": [{"r": "x", "s": 1}, {"r": "y", "s": 2}]}
    record = comparison(row, prompt="p.text", answers="c[].r", scores="c[].s")
    assert (record.answers, record.better_than) == (("x", "y"), ((1, 0, 0.0),))


def test_a_pattern_is_taken_out_of_answers_but_not_of_prompts() -> None:
    row = {"p": "what is [1]?", "r": "a fact [1] (really) [2, 3]."}
    record = read(row, prompt="p", response="r", remove=r"\s*\[\d+(?:,\s*\d+)*\]")
    assert isinstance(record, Demonstration)
    assert [turn["content"] for turn in record.messages] == ["what is [1]?", "a fact (really)."]


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"q": "a"}, {"prompt": "q", "response": "r"}, "there is no column r; the row has q"),
        ({"q": "a", "r": " "}, {"prompt": "q", "response": "r"}, "r: the answer is empty"),
        ({"q": "", "r": "b"}, {"prompt": "q", "response": "r"}, "q: the last user's turn is empty"),
        ({"q": ["a"], "r": "b"}, {"prompt": "q", "response": "r"}, r"q\[0\] should be a message"),
        (
            {"m": [user("a"), assistant(" "), user("b"), assistant("c")]},
            {"messages": "m"},
            "m: an answer before the last is empty",
        ),
        (
            {"q": [user("a"), assistant(""), user("b")], "r": "c"},
            {"prompt": "q", "response": "r"},
            "q: an answer before the last is empty",
        ),
        ({"m": '[{"content": "a"}]'}, {"messages": "m"}, r"m\[0\] has the role None"),
        ({"m": [user("a")]}, {"messages": "m"}, "m has no assistant's turn"),
        ({"m": [assistant("a")]}, {"messages": "m"}, "m does not end with a user's turn before the answer"),
        ({"p": [user("a"), assistant("b")]}, {"prompt": "p"}, "p does not end with a user's turn"),
        ({"t": " "}, {"text": "t"}, "t is empty"),
        ({"x": "a", "y": "b"}, {"chosen": "x", "rejected": "y"}, "x is one text without turns"),
        (
            {"x": [user("a"), assistant("b")], "y": [user("z"), assistant("b")]},
            {"chosen": "x", "rejected": "y"},
            "x and y are different conversations: they part at turn 1",
        ),
        (
            {"p": "q", "x": "a", "y": "b", "m": "much"},
            {"prompt": "p", "chosen": "x", "rejected": "y", "margin": "m"},
            "m should be a number, but is the text 'much'",
        ),
        (
            {"p": "q", "a": ["x"], "s": [1]},
            {"prompt": "p", "answers": "a", "scores": "s"},
            "a holds 1 answers",
        ),
        (
            {"p": "q", "a": ["x", "y"], "s": [1]},
            {"prompt": "p", "answers": "a", "scores": "s"},
            "s holds 1 numbers for 2 answers",
        ),
        (
            {"p": "q", "a": "x", "b": "y", "w": "left"},
            {"prompt": "p", "answers": ("a", "b"), "preference": "w"},
            "w should be 1 or 2, but is the text 'left'",
        ),
        (
            {"p": "q", "a": "x", "b": "y", "w": 7},
            {"prompt": "p", "answers": ("a", "b"), "preference": "w"},
            "w should be 1 or 2, but is int 7, outside of their range",
        ),
    ],
)
def test_rows_that_cannot_be_used_say_why(row: dict[str, Any], columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRowError, match=reason):
        read(row, **columns)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"p": [user("a")], "x": [assistant("g")], "y": [assistant("b")]}, {"prompt": "p"}),
        ({"p": "a", "x": assistant("g"), "y": assistant("b")}, {"prompt": "p"}),
        ({"p": "a", "x": json.dumps(assistant("g")), "y": str([assistant("b")])}, {"prompt": "p"}),
        ({"x": [user("a"), assistant("g")], "y": "b"}, {}),
        ({"x": "\n\nHuman: a\n\nAssistant: g", "y": [assistant("b")]}, {}),
        ({"p": "Human: a\n\nAssistant:", "x": " g", "y": " b"}, {"prompt": "p"}),
        ({"p": "q", "x": "Human: a\n\nAssistant: g", "y": "Human: a\n\nAssistant: b"}, {"prompt": "p"}),
        ({"x": {"role": ["user", "assistant"], "content": ["a", "g"]}, "y": "b"}, {}),
    ],
)
def test_answers_alone_follow_their_prompt_in_every_form(
    row: dict[str, Any], columns: dict[str, Any]
) -> None:
    record = comparison(row, chosen="x", rejected="y", **columns)
    assert (record.messages, record.answers) == ((user("a"),), ("g", "b"))


def test_turns_before_the_answer_go_on_after_the_prompt() -> None:
    more = [assistant("b"), user("c")]
    row = {"p": "a", "x": [*more, assistant("g")], "y": [*more, assistant("h")], "s": "Be kind."}
    record = comparison(row, prompt="p", chosen="x", rejected="y", system="s")
    assert record.messages == (system("Be kind."), user("a"), *more)
    shown = read({"p": "a", "r": [*more, assistant("g")]}, prompt="p", response="r")
    assert isinstance(shown, Demonstration)
    assert shown.messages == (user("a"), *more, assistant("g"))


@pytest.mark.parametrize("value", [None, float("nan")])
def test_an_optional_column_that_is_absent_says_nothing(value: Any) -> None:
    pair = {"p": "q", "x": "a", "y": "b", "m": value}
    for row in (pair, {k: v for k, v in pair.items() if k != "m"}):
        record = comparison(row, prompt="p", chosen="x", rejected="y", margin="m?")
        assert record.better_than == ((0, 1, 0.0),)
    verdict = {"p": "q", "a": "x", "b": "y", "w": value}
    assert comparison(verdict, prompt="p", answers=("a", "b"), preference="w?").better_than == ()
    two = {"p": "q", "a": "x", "b": "y", "c": value, "s": 1, "t": 2, "u": value}
    ranked = comparison(two, prompt="p", answers=("a", "b", "c?"), scores=("s", "t", "u?"))
    assert (ranked.answers, ranked.better_than) == (("x", "y"), ((1, 0, 0.0),))


def test_a_prompt_may_be_of_several_columns() -> None:
    columns: dict[str, Any] = {"prompt": ("i", "more?"), "response": "r"}
    for more in ({"more": "7"}, {"more": 7.0}):
        record = read({"i": "Double it.", **more, "r": "14"}, **columns)
        assert isinstance(record, Demonstration)
        assert record.messages[0] == user("Double it.\n\n7")
    for none in ({}, {"more": ""}, {"more": None}, {"more": float("nan")}):
        record = read({"i": "Double it.", **none, "r": "14"}, **columns)
        assert isinstance(record, Demonstration)
        assert record.messages[0] == user("Double it.")


def test_a_row_that_begins_with_a_name_is_a_transcript_unless_the_source_says_otherwise() -> None:
    row = {"p": "Human: hi", "r": "Assistant: hello"}
    found = [read(row, prompt="p", response="r", transcript=transcript) for transcript in (None, False)]
    texts = [[turn["content"] for turn in one.messages] for one in found if isinstance(one, Demonstration)]
    assert texts == [["hi", "hello"], ["Human: hi", "Assistant: hello"]]


def test_names_of_a_transcript_are_enough_to_make_it_one() -> None:
    row = {"t": "A chat. USER: hi ASSISTANT: hello</s>USER: how? ASSISTANT: so"}
    record = read(row, messages="t", transcript_names=("USER", "ASSISTANT"))
    assert isinstance(record, Demonstration)
    turns = (system("A chat."), user("hi"), assistant("hello"), user("how?"), assistant("so"))
    assert record.messages == turns


def test_a_skipped_task_is_a_prompt() -> None:
    skipped = {"q": "a", "r1": "x", "r2": "y", "annotations": [{"was_cancelled": True, "result": []}]}
    judged = {"prompt": "q", "answers": ("r1", "r2"), "preference": "annotations[0].result[0].value.selected"}
    record = read(skipped, preference_values=("left", "right"), **judged)
    assert isinstance(record, Prompt)
    done = {
        **skipped,
        "annotations": [{"was_cancelled": False, "result": [{"value": {"selected": "right"}}]}],
    }
    assert comparison(done, preference_values=("left", "right"), **judged).better_than == ((1, 0, 0.0),)
    assert isinstance(read(skipped, prompt="q", response="annotations[0].result[0].value.text[0]"), Prompt)


@pytest.mark.parametrize(
    ("row", "columns", "reason"),
    [
        ({"q": "a", "r": float("nan")}, {"prompt": "q", "response": "r"}, "r is null"),
        ({"q": "a", "r": float("inf")}, {"prompt": "q", "response": "r"}, "r should be text"),
        ({"q": "a", "r": "b", "label": False}, {"prompt": "q", "response": "r"}, "label is false"),
        ({"q": "a", "r": "b", "kto_tag": "False"}, {"prompt": "q", "response": "r"}, "kto_tag is false"),
        ({"m": [user("a"), assistant("b")], "label": False}, {"messages": "m"}, "label is false"),
        (
            {"m": [user("a"), assistant("b")], "tools": [{"name": "f"}]},
            {"messages": "m"},
            "the row has tools",
        ),
        (
            {"p": "[{'role': 'user' 'content': 1}\n {'role'", "r": "b"},
            {"prompt": "p", "response": "r"},
            "p begins as a list of messages, but is none",
        ),
        (
            {"p": "q", "x": [{**assistant("a"), "weight": 0}], "y": "b"},
            {"prompt": "p", "chosen": "x", "rejected": "y"},
            "x ends with a turn that is marked as not to be learnt",
        ),
        (
            {"p": "q", "a": [[user("z"), assistant("x")], "y"], "s": [1, 2]},
            {"prompt": "p", "answers": "a", "scores": "s"},
            r"a\[0\] is a conversation that does not begin as p",
        ),
    ],
)
def test_rows_whose_meaning_would_be_lost_say_why(
    row: dict[str, Any], columns: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BadRowError, match=reason):
        read(row, **columns)


@pytest.mark.parametrize("nothing", [{"label": True}, {"tools": []}, {"tools": None}, {"label": None}])
def test_columns_that_ask_for_nothing_are_no_fault(nothing: dict[str, Any]) -> None:
    record = read({"q": "a", "r": "b", **nothing}, prompt="q", response="r")
    assert isinstance(record, Demonstration)


def test_a_template_puts_columns_into_a_prompt() -> None:
    source = SourceConfig(path="t", prompt="Q: {question.text}\nHint: {hint?}", response="answer")
    rows = [
        {"question": {"text": "Why?"}, "hint": "Think.", "answer": "So."},
        {"question": {"text": "Why?"}, "answer": "So."},
    ]
    prompts = [record_of(row, source, "t").messages[0]["content"] for row in rows]  # type: ignore[union-attr]
    assert prompts == ["Q: Why?\nHint: Think.", "Q: Why?\nHint:"]
    with pytest.raises(BadRowError, match="there is no column question"):
        record_of({"answer": "So."}, source, "t")


@pytest.mark.parametrize("prompt", ["{question", "{}", "{a:>10}", "{a!r}"])
def test_what_is_no_template_is_refused(prompt: str) -> None:
    with pytest.raises(ValidationError, match="is no template"):
        SourceConfig(path="t", prompt=prompt, response="answer")
