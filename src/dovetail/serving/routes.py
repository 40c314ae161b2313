"""Define the routes of OpenAI's API.

Responsible for: checking a request against its model and the limits, and the two kinds of response, whole and
streamed. Not responsible for: keys, rates, sizes (gate.py), generation (choices.py).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from dovetail.engine import Sampling
from dovetail.serving.answer_text import AnswerText, Echo
from dovetail.serving.choices import Answering, Wanted
from dovetail.serving.gate import RequestLimits
from dovetail.serving.meters import Meters
from dovetail.serving.problems import ErrorBody, Problem
from dovetail.serving.protocol import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Model,
    ModelList,
    SamplingRequest,
)
from dovetail.serving.responses import ChatForm, EventStream, Form, TextForm, whole
from dovetail.serving.served_model import ServedModel

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "an error that the caller can correct"},
    "5XX": {"model": ErrorBody, "description": "an error of the server"},
}

_LEAST_TEMPERATURE = 1e-3


@dataclass(frozen=True, slots=True)
class Service:
    """The models, limits and metrics that the routes use."""

    models: dict[str, ServedModel]
    limits: RequestLimits
    meters: Meters
    started: int
    """The Unix time of the start, in seconds."""

    def model(self, name: str) -> ServedModel:
        """Return the model of this name. Raises Problem if there is none."""
        if name not in self.models:
            known = ", ".join(self.models)
            raise Problem(
                404, f"no model {name!r} here; there are: {known}", param="model", code="model_not_found"
            )
        return self.models[name]

    def described(self, model: ServedModel) -> dict[str, Any]:
        """Describe a model as /v1/models lists it."""
        return {
            "id": model.name,
            "object": "model",
            "created": self.started,
            "owned_by": "dovetail",
            "max_model_len": model.thread.max_tokens,
        }


def api_routes(service: Service) -> APIRouter:
    """Build the routes /v1/models, /v1/chat/completions and /v1/completions."""
    router = APIRouter(prefix="/v1", responses=_ERRORS)
    event = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
    streams: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": event}}}}

    @router.get("/models", response_model=ModelList)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [service.described(model) for model in service.models.values()]}

    @router.get("/models/{name:path}", response_model=Model)
    async def show_model(name: str) -> dict[str, Any]:
        return service.described(service.model(name))

    @router.post(
        "/chat/completions",
        response_model=ChatCompletion,
        response_model_exclude_unset=True,
        responses=streams,
    )
    async def complete_chat(wanted: ChatRequest, request: Request) -> Response | dict[str, Any]:
        return await _complete_chat(service, wanted, request)

    @router.post(
        "/completions", response_model=Completion, response_model_exclude_unset=True, responses=streams
    )
    async def complete_text(wanted: CompletionRequest, request: Request) -> Response | dict[str, Any]:
        return await _complete_text(service, wanted, request)

    return router


async def _complete_chat(
    service: Service, wanted: ChatRequest, request: Request
) -> Response | dict[str, Any]:
    model = service.model(wanted.model)
    if wanted.top_logprobs is not None and not wanted.logprobs:
        raise Problem(400, "top_logprobs: it needs logprobs = true", param="top_logprobs")
    if len({wanted.max_tokens, wanted.max_completion_tokens} - {None}) > 1:
        raise Problem(
            400,
            f"max_completion_tokens = {wanted.max_completion_tokens} and max_tokens = {wanted.max_tokens}: "
            "give one of them, not both",
            param="max_tokens",
        )
    prompt = await asyncio.to_thread(model.chat_ids, [turn.plain() for turn in wanted.messages])
    chat, stops = model.chat, (*wanted.stops, *model.chat.stop_strings)
    num_top = (wanted.top_logprobs or 0) if wanted.logprobs else None
    room = _room_for_answers(
        service.limits, model, [prompt], wanted.max_completion_tokens or wanted.max_tokens
    )
    answering = _begin(
        service,
        wanted,
        [prompt],
        _sampling(wanted, model, max_new_tokens=room, stops=stops, top_logprobs=num_top or 0),
        num_prompt_top=wanted.prompt_logprobs,
        new_text=lambda _prompt: AnswerText(chat, chat.answer_stream(stops), num_top=num_top),
    )
    form = ChatForm(
        _new_id("chatcmpl"),
        wanted.model,
        chat,
        has_logprobs=num_top is not None,
        num_prompt_logprobs=wanted.prompt_logprobs,
    )
    return await _respond(answering, form, wanted, request)


async def _complete_text(
    service: Service, wanted: CompletionRequest, request: Request
) -> Response | dict[str, Any]:
    model = service.model(wanted.model)
    if not wanted.prompts():
        raise Problem(400, "prompt: it is an empty list", param="prompt")
    given = wanted.prompts()
    prompts = [
        await asyncio.to_thread(model.text_ids, prompt) if isinstance(prompt, str) else prompt
        for prompt in given
    ]
    chat, num_top = model.chat, wanted.logprobs

    def new_text(index: int) -> AnswerText:
        ids = prompts[index]
        echo = Echo.of(given[index], ids, chat) if wanted.echo else None
        stream = chat.text_stream(wanted.stops, behind=ids)
        return AnswerText(chat, stream, behind=ids, echo=echo, num_top=num_top)

    scored = [
        count for count in (num_top if wanted.echo else None, wanted.prompt_logprobs) if count is not None
    ]
    room = _room_for_answers(service.limits, model, prompts, wanted.max_tokens, cuts=True)
    answering = _begin(
        service,
        wanted,
        prompts,
        _sampling(wanted, model, max_new_tokens=room, stops=wanted.stops, top_logprobs=num_top or 0),
        num_prompt_top=max(scored, default=None),
        new_text=new_text,
    )
    form = TextForm(
        _new_id("cmpl"),
        wanted.model,
        chat,
        has_logprobs=num_top is not None,
        num_prompt_logprobs=wanted.prompt_logprobs,
    )
    return await _respond(answering, form, wanted, request)


async def _respond(
    answering: Answering, form: Form, wanted: SamplingRequest, request: Request
) -> Response | dict[str, Any]:
    if wanted.stream:
        options = wanted.stream_options
        return EventStream(answering, form, has_usage=options is not None and options.include_usage)
    return await whole(answering, form, request)


def _begin(
    service: Service,
    wanted: SamplingRequest,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    num_prompt_top: int | None,
    new_text: Callable[[int], AnswerText],
) -> Answering:
    if wanted.stream_options is not None and not wanted.stream:
        raise Problem(400, "stream_options: only with stream = true", param="stream_options")
    if wanted.prompt_logprobs is not None and wanted.stream:
        raise Problem(400, "prompt_logprobs: not with stream = true", param="prompt_logprobs")
    num_choices = wanted.n or 1
    if num_choices * len(prompts) > service.limits.max_choices:
        raise Problem(
            400,
            f"n: {num_choices * len(prompts)} answers, and one request may ask for {service.limits.max_choices}",
            param="n",
        )
    seed = secrets.randbits(62) if wanted.seed is None else wanted.seed
    asked = Wanted(
        prompts=prompts,
        sampling=sampling,
        seed=seed,
        num_choices=num_choices,
        num_prompt_top=num_prompt_top,
    )
    return Answering(service.model(wanted.model), asked, new_text, service.meters)


def _sampling(
    wanted: SamplingRequest,
    model: ServedModel,
    *,
    max_new_tokens: int,
    stops: tuple[str, ...],
    top_logprobs: int,
) -> Sampling:
    return Sampling(
        max_new_tokens=max_new_tokens,
        temperature=_temperature(wanted),
        top_p=wanted.top_p or None,
        top_k=wanted.top_k,
        min_p=wanted.min_p,
        repetition_penalty=wanted.repetition_penalty,
        stop_token_ids=model.chat.stop_token_ids,
        stop_strings=stops,
        top_logprobs=top_logprobs,
    )


def _temperature(wanted: SamplingRequest) -> float:
    """Return the temperature, or 0 if it is below the least one or top_p is 0.

    Logits divided by a smaller temperature overflow float32, and the distribution is a single token long before that.
    """
    temperature = 1.0 if wanted.temperature is None else wanted.temperature
    return 0.0 if wanted.top_p == 0 or temperature < _LEAST_TEMPERATURE else temperature


def _room_for_answers(
    limits: RequestLimits,
    model: ServedModel,
    prompts: Sequence[Sequence[int]],
    wanted: int | None,
    *,
    cuts: bool = False,
) -> int:
    """Return the most new tokens. Raises Problem if prompt, limits and context leave no room for the wanted ones.

    cuts: allow fewer tokens than wanted if the context ends sooner; without it that is a Problem too.
    """
    context, longest = model.thread.max_tokens, max(map(len, prompts))
    if limits.max_prompt_tokens is not None and longest > limits.max_prompt_tokens:
        raise Problem(
            400,
            f"the prompt has {longest} tokens, and this server takes {limits.max_prompt_tokens}",
            code="prompt_too_long",
        )
    room = context - longest
    if room < 1 or (wanted is not None and wanted > room and not cuts):
        asked = f" and {wanted} new ones" if wanted is not None else ""
        raise Problem(
            400,
            f"the model's context is {context} tokens; the prompt has {longest}{asked}",
            code="context_length_exceeded",
        )
    most = limits.max_new_tokens
    if most is not None and wanted is not None and wanted > most:
        raise Problem(400, f"max_tokens: {wanted}, and this server gives {most}", param="max_tokens")
    return min(room, wanted or room, most or room)


def _new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
