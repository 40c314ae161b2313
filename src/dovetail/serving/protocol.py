"""Define the requests and responses of OpenAI's API that this server supports.

Responsible for: names, types and bounds. Not responsible for: checks that depend on the model (routes.py), parameters
that this server lacks (unsupported.py), which are errors, never ignored, unless their value asks for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from dovetail.serving import unsupported
from dovetail.serving.unsupported import Request
from dovetail.text.message import Message, message

_INT64 = 2**63
_MOST_STOPS = 4


def _only_zero(value: float | None) -> float | None:
    if value:
        raise ValueError("only 0 is possible: this server has repetition_penalty instead")
    return value


def _only_empty(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value:
        raise ValueError("this server cannot bias single tokens")
    return value


def _encodable(text: str) -> str:
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("half a surrogate pair is not a character")
    return text


def _whole(value: Any) -> Any:
    """Turn a float without a fraction into an int, because 1.0 is an integer in JSON."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _all_tokens(value: Any) -> Any:
    """Turn 0 and -1, which other servers use for no limit, into None."""
    return None if not isinstance(value, bool) and value in (0, -1) else value


_WHOLE = BeforeValidator(_whole)
_Text = Annotated[str, AfterValidator(_encodable)]
_Zero = Annotated[
    float | None, AfterValidator(_only_zero), Field(json_schema_extra={"minimum": 0, "maximum": 0})
]
_Stop = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]
_Stops = _Stop | Annotated[list[_Stop], Field(max_length=_MOST_STOPS)] | None
_TokenId = Annotated[int, Field(ge=0, lt=2**31), _WHOLE]


class StreamOptions(Request):
    """The parts of a stream besides the answer."""

    neutral: ClassVar = unsupported.STREAM_OPTIONS
    include_usage: bool = False
    """True if the stream ends with a chunk that holds the token counts and no choice."""


class SamplingRequest(Request):
    """The parameters that chat and text completions share."""

    model: _Text
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128), _WHOLE] | None = 1
    max_tokens: Annotated[int, Field(ge=1, le=2**31), _WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    top_k: Annotated[Annotated[int, Field(ge=-1, le=2**31)] | None, _WHOLE, BeforeValidator(_all_tokens)] = (
        None
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64), _WHOLE] | None = None
    stop: _Stops = None
    presence_penalty: _Zero = None
    frequency_penalty: _Zero = None
    logit_bias: Annotated[
        dict[str, Any] | None, AfterValidator(_only_empty), Field(json_schema_extra={"maxProperties": 0})
    ] = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20), _WHOLE] | None = None
    """The number of likeliest tokens to list at each place of the prompt, besides its own token; from vLLM."""
    user: str | None = None
    """A name that is accepted for compatibility, but neither used nor stored, like the next two fields."""
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TextPart(Request):
    """A piece of a message's content."""

    type: Literal["text"]
    text: _Text


class ResponseFormat(Request):
    """The form of an answer, which can only be plain text."""

    type: Literal["text"]


class ChatMessage(Request):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: _Text | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    """The name of one of several speakers with the same role; chat templates have no place for it."""

    def plain(self) -> Message:
        """Return the message in the form that chat templates take."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return message("system" if self.role == "developer" else self.role, text)


class ChatRequest(SamplingRequest):
    """The body of POST /v1/chat/completions."""

    neutral: ClassVar = unsupported.CHAT
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31), _WHOLE] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20), _WHOLE] | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(SamplingRequest):
    """The body of POST /v1/completions."""

    neutral: ClassVar = unsupported.TEXT
    prompt: _Text | list[_TokenId] | list[_Text] | list[list[_TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=5), _WHOLE] | None = None
    echo: bool | None = False

    def prompts(self) -> Sequence[str | Sequence[int]]:
        """Return the prompts as a sequence, also if there is one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [one for one in self.prompt if not isinstance(one, int)]


class Usage(BaseModel):
    """The token counts of one response."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PromptToken(BaseModel):
    """A token at one place of a prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptToken] | None]
"""One entry for each place of the prompt: its own token and the likeliest ones, by id; None for the first place."""


class TopLogprob(BaseModel):
    """A token and its log-probability under the distribution that was sampled from."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The sampled token, and the likeliest ones at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of an answer's tokens."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """The turn that the model wrote."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """One answer to a chat request."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The response of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None


class TextLogprobs(BaseModel):
    """The tokens of a text, with their log-probabilities and offsets."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """The log-probability of each token; None for the first token of an echoed prompt, which has no context."""
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    """The place at which each token begins in the text."""


class TextChoice(BaseModel):
    """One continuation of a prompt."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    prompt_logprobs: PromptLogprobs | None = None


class Completion(BaseModel):
    """The response of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Model(BaseModel):
    """A model of this server."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    """The largest number of tokens of prompt and answer together."""


class ModelList(BaseModel):
    """The response of GET /v1/models."""

    object: Literal["list"]
    data: list[Model]
