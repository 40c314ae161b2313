"""Replies equal what whole conversations contain, calls are read or said to be unreadable, functions are described."""

import json
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dovetail.errors import ConfigError, ModelError
from dovetail.text.chat_format import ChatFormat
from dovetail.text.message import Message, message
from dovetail.text.tools import ToolCall, parse_calls, schema_of
from tests.text import tokenizers
from tests.text.tokenizers import byte_level, sentence_piece

QWEN = (  # in the manner of Qwen 2.5: tools in the system message, their results in user turns
    "{% if tools %}{{ '<|im_start|>system\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n' }}{% endif %}"
    "{{ 'Tools:' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif messages[0]['role'] == 'system' %}"
    "{{ '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{% if loop.previtem['role'] != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message['content'] + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem['role'] != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif message['role'] != 'system' %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    name: getattr(tokenizers, name)
    for name in ("CHATML", "LLAMA3", "INST", "GEMMA", "THINKING", "NO_FLAG", "NO_END")
} | {"none": None, "QWEN": QWEN}
ASKED = [message("user", "What is the capital of France ?")]
SAID = message("assistant", "I think so .")
REPLIES = [message("user", "yes ! <|im_end|> two")]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first one.
        b: The second one.
    """
    return a + b


SCHEMA = schema_of(add)


def result(text: str) -> Message:
    return {"role": "tool", "content": text, "name": "add"}


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reply_is_what_the_whole_conversation_has_between_two_answers(name: str, make: Any) -> None:
    chat = ChatFormat(make(TEMPLATES[name]))
    whole = chat.prompt_ids([*ASKED, SAID, *REPLIES])
    assert whole == chat.prompt_ids(ASKED) + chat.answer_ids(SAID["content"]) + chat.reply_ids(REPLIES)


@pytest.mark.parametrize("name", ["QWEN", "CHATML", "GEMMA", "INST", "none"])
def test_results_of_tools_are_what_the_whole_conversation_has(name: str) -> None:
    chat = ChatFormat(byte_level(TEMPLATES[name]), tools=[SCHEMA])
    results = [result("five"), result("<|im_start|> six")]
    whole = chat.prompt_ids([*ASKED, SAID, *results])
    assert whole == chat.prompt_ids(ASKED) + chat.answer_ids(SAID["content"]) + chat.reply_ids(results)
    text = chat.tokenizer.decode(chat.reply_ids(results))
    expected = "<tool_response>\nfive\n</tool_response>\n<tool_response>\n<|im_start|> six\n</tool_response>"
    assert expected in text
    if name == "QWEN":
        assert text == f"\n<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_that_takes_tools_prints_them_itself() -> None:
    tokenizer = byte_level(QWEN)
    chat = ChatFormat(tokenizer, tools=[SCHEMA])
    native = tokenizer.apply_chat_template(ASKED, tools=[SCHEMA], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(chat.prompt_ids(ASKED)) == native
    assert ChatFormat(tokenizer).prompt_ids(ASKED) != chat.prompt_ids(ASKED)


@pytest.mark.parametrize("name", ["CHATML", "GEMMA", "none"])
def test_other_templates_describe_tools_in_the_first_message(name: str) -> None:
    chat = ChatFormat(byte_level(TEMPLATES[name]), tools=[SCHEMA])
    text = chat.tokenizer.decode(chat.prompt_ids([message("system", "Be brief ."), *ASKED]))
    assert json.dumps(SCHEMA) in text
    assert text.index("Be brief") < text.index("<tools>") < text.index("What is the capital")


def test_a_model_that_ends_a_turn_with_the_next_header_needs_no_second_one() -> None:
    chat = ChatFormat(byte_level(tokenizers.NO_FLAG.replace("+ '<|im_end|>\n'", "")))
    opening, end = (
        chat.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|endoftext|>")
    )
    whole = chat.reply_ids(REPLIES, behind=end)
    assert whole[0] == opening
    assert chat.reply_ids(REPLIES, behind=opening) == whole[1:]


def test_a_template_that_rewrites_answers_before_a_reply_is_named() -> None:
    rewriting = tokenizers.CHATML.replace("message['content']", "message['content'] | upper")
    with pytest.raises(ModelError, match=r"prints an answer in another form once a reply \(user\) follows"):
        ChatFormat(byte_level(rewriting)).reply_ids([message("user", "yes !")])


CALLS: dict[str, tuple[str, list[ToolCall], list[str]]] = {
    "one": ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', [ToolCall("add", {"a": 1})], []),
    "two between words": (
        'Let me see.\n<tool_call>\n{"name": "f"}\n</tool_call> and <tool_call>{"name": "g"}</tool_call> ...',
        [ToolCall("f", {}), ToolCall("g", {})],
        [],
    ),
    "none": ("The answer is 5, {1, 2}.", [], []),
    "an open one": ('<tool_call>{"name": "add"}', [], ["the call has no closing tag </tool_call>"]),
    "no JSON": ("<tool_call>add(1, 2)</tool_call>", [], ["the call is not valid JSON: Expecting value"]),
    "deep JSON": (f"<tool_call>{'[' * 100_000}</tool_call>", [], ["the call is not valid JSON"]),
    "no name": ('<tool_call>{"arguments": {}}</tool_call>', [], ["the call has no name"]),
    "a list": ("<tool_call>[1]</tool_call>", [], ["the call has no name"]),
    "arguments in a list": (
        '<tool_call>{"name": "add", "arguments": [1, 2]}</tool_call>', [], ["the arguments of add are no JSON object"],
    ),
    "one of two": (
        '<tool_call>{"name": "f"}</tool_call><tool_call>{</tool_call>', [ToolCall("f", {})], ["the call is not valid"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_in_tags_are_read(name: str) -> None:
    text, calls, errors = CALLS[name]
    parsed = parse_calls(text, byte_level())
    assert list(parsed.calls) == calls
    assert len(parsed.errors) == len(errors)
    assert all(found.startswith(expected) for found, expected in zip(parsed.errors, errors, strict=True))


def own_parser() -> PreTrainedTokenizerFast:
    tokenizer = byte_level(tokenizers.CHATML)
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "tool_calls": {
                "open": "[CALL]",
                "close": "[END]",
                "content": "json",
                "repeats": True,
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {},
        },
    }
    return tokenizer


def test_a_tokenizer_with_a_parser_of_its_own_reads_its_own_form() -> None:
    chat = ChatFormat(own_parser(), tools=[SCHEMA])
    parsed = chat.calls_in(chat.answer_ids('[CALL]{"name": "add", "arguments": {"a": 1, "b": 2}}[END]'))
    assert parsed.calls == (ToolCall("add", {"a": 1, "b": 2}),)
    assert chat.calls_in(chat.answer_ids("The answer is five .")).calls == ()
    broken = chat.calls_in(chat.answer_ids('[CALL]{"name": [END]'))
    assert broken.calls == ()
    assert broken.errors[0].startswith("the call cannot be read: ")


def test_a_function_without_types_or_docstring_is_named() -> None:
    def untyped(a):  # type: ignore[no-untyped-def]
        """Do something.

        Args:
            a: A thing.
        """

    def unsaid(a: int) -> int:
        return a

    for function in (untyped, unsaid):
        with pytest.raises(ConfigError, match=f"the tool {function.__name__} cannot be described"):
            schema_of(function)
