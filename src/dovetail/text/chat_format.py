"""Conversations as tokens, with a mask of those that the assistant wrote. No other module knows role markers.

Responsible for: prompts, conversations with their loss mask, answers, stop tokens and decoding, for any chat
template; a Human/Assistant template for tokenizers without one.
Not responsible for: loading the tokenizer (tokenizer.py), length limits (data/tokenize.py).

These rules hold for every template:

- prompt_ids(m) + answer_ids(a) == conversation(m + [a])[0]: training sees what generation sees.
- prompt_ids(m) is what `tokenizer.apply_chat_template(m, add_generation_prompt=True)` gives, except that an
  earlier answer stands as it was sampled: behind its own prompt, with no token merged across the border.
- A conversation ends with the assistant's end-of-turn token; what templates print after it (a line break in
  ChatML) opens the next turn.
- The text of a message stays text, even if it reads `<|im_end|>`: only the template makes special tokens.
- If an answer repeats the end of its generation prompt, such as `<think>`, the mark is kept once, in the prompt.
- A turn that is marked as not learnt is context.
- A template that rewrites earlier turns (one that removes their reasoning) gives them as generation would see
  them. They are then context, and the mask marks the last turn alone.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from dovetail.errors import ModelError
from dovetail.text.message import Message, is_learnt, message
from dovetail.text.template import Encoder, Passage, Template, model_ends, special_token_texts
from dovetail.text.text_stream import TextStream
from dovetail.text.tools import ParsedCalls, Schema, parse_calls
from dovetail.text.turn_shape import HOLE, learn_shape

DEFAULT_TEMPLATE = (
    r"{%- for message in messages -%}"
    r"{%- if message['role'] == 'system' -%}{{- message['content'] -}}"
    r"{%- elif message['role'] == 'user' -%}{{- '\n\nHuman: ' + message['content'] -}}"
    r"{%- else -%}{{- '\n\nAssistant: ' + message['content'] + eos_token -}}{%- endif -%}"
    r"{%- endfor -%}"
    r"{%- if add_generation_prompt -%}{{- '\n\nAssistant:' -}}{%- endif -%}"
)
"""The template for tokenizers without one: Anthropic's transcripts, each answer ended by the end-of-text token."""

_NEXT_QUESTION = "\n\nHuman:"
_FIRST_TOKEN = r"{{- bos_token -}}"

_HOLES = re.compile(HOLE.format("([0-9]+)"))


class ChatFormat:
    """The written form of conversations for one tokenizer, whose `chat_template` is always the one in use."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None = None, *, tools: Sequence[Schema] = ()
    ) -> None:
        """Learn the form from the template; tools: those that every conversation offers to the assistant."""
        chosen = template or tokenizer.chat_template or default_template(tokenizer)
        if chosen != tokenizer.chat_template:
            tokenizer = copy.copy(tokenizer)  # the caller's tokenizer keeps its template
            tokenizer.chat_template = chosen
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        specials = special_token_texts(tokenizer)
        self._special = re.compile("|".join(map(re.escape, specials))) if specials else None
        self._template = Template(tokenizer, tools)
        self._tools = tools
        self._shape = learn_shape(tokenizer, self._template.render)
        self._end_id = _one_token(self._encoder, tokenizer, self._shape.end_token)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation up to the point where the assistant must answer."""
        return self.encode_prompts([messages])[0]

    def conversation(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Return the tokens of a conversation that ends with an answer, and a mask of the assistant's."""
        return self.encode_conversations([messages])[0]

    def answer_ids(self, text: str) -> list[int]:
        """Return the tokens of an answer, end-of-turn token included."""
        return self.encode_answers([text])[0]

    def reply_ids(self, replies: Sequence[Message], *, behind: int | None = None) -> list[int]:
        """Return the tokens between an answer and the next one: the replies to it, as the template prints them.

        behind: the answer's last token. Some models end a turn with the token that opens the next one.
        Raises ModelError if the template does not print an answer as it was sampled once a reply follows.
        """
        passages = self._prompt([message("user", "u"), message("assistant", "a"), *replies])
        answers = [place for place, passage in enumerate(passages) if passage.is_learnt]
        if len(answers) != 1:
            roles = ", ".join(reply["role"] for reply in replies)
            raise ModelError(
                f"the chat template prints an answer in another form once a reply ({roles}) follows it",
                hint="set chat_template to one that prints earlier answers as they are",
            )
        encoded = self._encoder.many([passages[answers[0] + 1 :]])
        ids = [i for piece in encoded[0] for i in piece]
        return ids[1:] if ids[:1] == [behind] else ids

    def calls_in(self, ids: Sequence[int]) -> ParsedCalls:
        """Return the tool calls in the tokens of an answer, read as the tokenizer's own parser does if it has one."""
        kept = list(ids)
        while kept and kept[-1] in self.stop_token_ids:
            kept.pop()
        text = str(self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        return parse_calls(text, self.tokenizer, prefix=self._shape.tail, tools=self._tools)

    def text_ids(self, text: str) -> list[int]:
        """Return the tokens of a text that is no conversation, its special tokens recognised."""
        return self._encoder.as_given(text)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids of the template's end-of-turn token, the tokenizer's end of text, and the ends the model declares."""
        ends = (self._end_id, self.tokenizer.eos_token_id, *model_ends(self.tokenizer))
        return tuple(dict.fromkeys(i for i in ends if isinstance(i, int)))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The texts that also end an answer.

        Where the next question begins with plain text and no token, a model that has not learnt to stop writes it
        itself.
        """
        return (_NEXT_QUESTION,) if _NEXT_QUESTION.strip() in str(self.tokenizer.chat_template) else ()

    @cached_property
    def fingerprint(self) -> str:
        """A hash that changes with everything that decides the tokens of a conversation."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
        specials = sorted(tokenizer.special_tokens_map.items())
        example = self._template.render([message("user", "u")])  # with the date, if the template prints it
        parts = (vocabulary, repr(tokenizer.chat_template), repr(specials), example)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens: decode(answer_ids(text)) == text."""
        return self._text_of(ids).removeprefix(self._shape.lead).removesuffix(self._before_end)

    def answer_stream(self, stops: Sequence[str] = ()) -> TextStream:
        """Return a stream that decodes an answer as `decode` does, piece by piece."""
        return TextStream(self._text_of, stops=stops, lead=self._shape.lead, before_end=self._before_end)

    def text_stream(self, stops: Sequence[str] = (), *, behind: Sequence[int] = ()) -> TextStream:
        """Return a stream that decodes the text that continues `text_ids`, piece by piece; nothing is removed from it.

        behind: the ids that the text continues. Some tokenizers write the first token of a text without its space;
        behind a special token a text begins anew.
        """
        begins_anew = behind and behind[-1] in (*self.stop_token_ids, *self.tokenizer.all_special_ids)
        return TextStream(self._text_of, stops=stops, behind=() if begins_anew else behind)

    def encode_prompts(self, rows: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return `prompt_ids` of many conversations at once, which is much faster."""
        encoded = self._encoder.many([self._prompt(messages) for messages in rows])
        return [[i for piece in pieces for i in piece] for pieces in encoded]

    def encode_conversations(self, rows: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """Return `conversation` of many conversations at once."""
        layouts = []
        for messages in rows:
            if not messages or messages[-1]["role"] != "assistant":
                raise ValueError("a conversation ends with an assistant's turn; for others use prompt_ids")
            answer = self._shape.without_opening(messages[-1]["content"])
            layouts.append([*self._prompt(messages[:-1]), *self._answer(answer)])
        out = []
        for layout, pieces in zip(layouts, self._encoder.many(layouts), strict=True):
            ids = [i for piece in pieces for i in piece]
            owners = zip(layout, pieces, strict=True)
            out.append((ids, [passage.is_learnt for passage, piece in owners for _ in piece]))
        return out

    def encode_answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Return `answer_ids` of many answers at once."""
        encoded = self._encoder.many([self._answer(self._shape.without_opening(text)) for text in texts])
        return [[i for piece in pieces for i in piece] for pieces in encoded]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode plain texts, each between the tokenizer's first token, if it puts one, and the end-of-text token.

        Where a text has these tokens itself, they are not added again.
        """
        tokenizer = self.tokenizer
        eos = tokenizer.eos_token_id
        front = [int(tokenizer.bos_token_id)] if starts_with_bos(tokenizer) else []
        back = [int(eos)] if isinstance(eos, int) else [self._end_id]
        bare = [
            text.removeprefix(str(tokenizer.bos_token or "")).removesuffix(str(tokenizer.eos_token or ""))
            for text in texts
        ]
        encoded = self._encoder.many([[Passage(text, is_quoted=True)] for text in bare])
        return [[*front, *ids, *back] for (ids,) in encoded]

    def repeats_opening(self, answer: str) -> bool:
        """Return whether an answer begins with the mark that ends the generation prompt, such as `<think>`."""
        return self._shape.without_opening(answer) != answer

    @property
    def opening(self) -> str | None:
        """The mark that ends a generation prompt, such as `<think>` or `Assistant:`; None for a bare word."""
        return self._shape.opening

    @property
    def closing_tag(self) -> str | None:
        """The tag that an answer must close, such as `</think>`, where the generation prompt ends with `<think>`."""
        return self._shape.closing_tag

    @property
    def _before_end(self) -> str:
        return self._shape.end.removesuffix(self._shape.end_token)

    def _text_of(self, ids: Sequence[int]) -> str:
        """Decode ids without special tokens and without those that end an answer."""
        kept = list(ids)
        while kept and kept[-1] in self.stop_token_ids:
            kept.pop()
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _answer(self, content: str, *, is_learnt: bool = True) -> list[Passage]:
        shape = self._shape
        text = shape.lead + self._stripped(content)
        if self._has_special(content):
            quoted = Passage(text, behind=shape.tail, is_learnt=is_learnt, is_quoted=True)
            return [quoted, Passage(shape.end, is_learnt=is_learnt)]
        return [Passage(text + shape.end, behind=shape.tail, is_learnt=is_learnt)]

    def _prompt(self, messages: Sequence[Message]) -> list[Passage]:
        """Return the passages of a prompt: stretches of template and users' text, with the answers between them."""
        turns = self._template.adapted(messages)
        has_special = [self._has_special(turn["content"]) for turn in turns]
        holes = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" or has_special[i]]
        holed = [message(t["role"], HOLE.format(i)) if i in holes else t for i, t in enumerate(turns)]
        rendered = self._template.render(holed)
        passages = self._fill(_HOLES.split(rendered), turns, holes)
        if passages is not None and not holes:
            return passages
        native = self._template.render(turns)
        filled = _HOLES.sub(lambda hole: self._stripped(turns[int(hole[1])]["content"]), rendered)
        # Special tokens in a user's text are worse than reasoning that stays in an earlier turn.
        if passages is not None and (filled == native or any(has_special)):
            return passages
        return [Passage(native + self._shape.header)]

    def _fill(self, parts: list[str], turns: Sequence[Message], holes: list[int]) -> list[Passage] | None:
        """Return the passages of a rendered prompt split at its holes; None if the template changed the holes."""
        if [int(i) for i in parts[1::2]] != holes:
            return None
        shape, stretches = self._shape, parts[0::2]
        stretches[-1] += shape.header
        passages: list[Passage] = []
        behind = ""
        for index, stretch, following in zip(holes, stretches, range(1, len(stretches)), strict=False):
            is_answer = turns[index]["role"] == "assistant"
            if is_answer:
                if not stretch.endswith(shape.lead) or not stretches[following].startswith(shape.printed_end):
                    return None
                stretch = stretch[: len(stretch) - len(shape.lead)]
                stretches[following] = stretches[following][len(shape.printed_end) :]
            passages.append(Passage(stretch, behind=behind))
            content = self._stripped(turns[index]["content"])
            if is_answer and shape.opens(stretch):
                content = shape.without_opening(content)
            passages += (
                self._answer(content, is_learnt=is_learnt(turns[index]))
                if is_answer
                else [Passage(content, is_quoted=True)]
            )
            behind = shape.end_token if is_answer else ""
        return [*passages, Passage(stretches[-1], behind=behind)]

    def _stripped(self, content: str) -> str:
        return content.strip() if self._shape.strips else content

    def _has_special(self, text: str) -> bool:
        return self._special is not None and self._special.search(text) is not None


def template_ids(chat: ChatFormat) -> set[int]:
    """Return the ids that occur in conversations of any content: those of the template, and the stop tokens."""
    turns = [message("system", "Be brief."), message("user", "Hello"), message("assistant", "Hello!")]
    return {*chat.conversation(turns)[0], *chat.prompt_ids(turns[:2]), *chat.stop_token_ids}


def _one_token(encoder: Encoder, tokenizer: PreTrainedTokenizerBase, end: str) -> int:
    """Return the id of the token that ends an answer.

    An end of several tokens would end answers at its last piece.
    """
    end_id = encoder.one(end)[-1]
    if tokenizer.convert_ids_to_tokens(end_id) != end:
        raise ModelError(
            f"answers end with {end!r}, which is not a token of the tokenizer",
            hint="set eos_token in the tokenizer's tokenizer_config.json to a token that it has, or give a "
            "chat_template whose turns end with one",
        )
    return end_id


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the Human/Assistant template, with the beginning-of-text token in front where this tokenizer puts one."""
    return _FIRST_TOKEN + DEFAULT_TEMPLATE if starts_with_bos(tokenizer) else DEFAULT_TEMPLATE


def starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether this tokenizer puts its beginning-of-text token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
