"""One model, two modes: generate with the very parameters that training updates.

Responsible for: entering and leaving the generating mode, and turning requests into completions.
Not responsible for: the generation loop (paged.py), attention (forward.py, forward.py), the draw
(sampling.py).

    engine = HybridEngine(model)
    with engine.generating() as generate:
        completions = generate(prompts, Sampling(max_new_tokens=64), seeds=seeds)

Inside the block the model is in evaluation mode, its attention is Dovetail's and the KV arena exists; afterwards,
and after an exception, everything is as it was. No weight is copied, and no cache outlives its block: a
parameter changed between two blocks is what the second one uses.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch

from dovetail.engine.forward import PackedModules, expect_causal_lm
from dovetail.engine.kv_cache import pages_for
from dovetail.engine.padded import SLOW_WAYS, SlowGeneration
from dovetail.engine.paged import Counts, Limits, PagedGeneration, Source
from dovetail.engine.probe import Way, find_way
from dovetail.engine.prompt_scores import TokenScore, prompt_scores
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import Answer, Completion, DecodeText, Listener, OnToken, expect_usable
from dovetail.errors import GenerationError
from dovetail.model.forward import context_of, evaluation_mode, plain_model, vocabulary_of
from dovetail.model.placement import is_out_of_memory
from dovetail.parallel.world import WHOLE, TensorGroup
from dovetail.planning.memory import MAX_RUNNING, PAGE_TOKENS, PREFILL_TOKENS
from dovetail.telemetry.log import warn

_PADDED_BATCH = 32
_UNLIMITED_CONTEXT = 32768
"""The context assumed where a model names no limit."""


class HybridEngine:
    """Generation for one causal language model, plain or wrapped by peft."""

    def __init__(
        self,
        model: Any,
        *,
        device: torch.device | None = None,
        max_running: int = MAX_RUNNING,
        max_prefill_tokens: int = PREFILL_TOKENS,
        max_cache_tokens: int | None = None,
        weights: Callable[[], AbstractContextManager[Any]] = nullcontext,
        group: TensorGroup = WHOLE,
    ) -> None:
        """Keep the model and the settings; see `Limits` for the numbers.

        device: by default that of the parameters. weights: a context within which the model's parameters are there, if
        they are not always. group: the processes that hold slices of them (parallel/tensor.py); all of them enter
        `generating` and make the same calls, and all get the same answers.
        """
        self._wrapped = model
        self.model = plain_model(model)
        expect_causal_lm(self.model)
        self._device = device
        self.weights = weights
        self._limits = Limits(max_running, max_prefill_tokens, max_cache_tokens)
        self.group = group
        self.modules = PackedModules(self.model, group)
        self.vocabulary = vocabulary_of(self.model)
        self.context = context_of(self.model)
        self._ways: dict[torch.dtype, Way] = {}
        self._warned: set[str] = set()
        self._is_generating = False
        self.counts = Counts(preempted=0, shared_tokens=0)
        """The counts of the last call to generate."""

    @contextmanager
    def generating(self) -> Iterator[Generate]:
        """Set evaluation mode, Dovetail's attention and a KV arena within the block; undo all at its end."""
        with self._occupied(), self.weights():
            session = Generate(self)
            try:
                with evaluation_mode(self._wrapped), session.attention():
                    yield session
            finally:
                session.close()

    @contextmanager
    def serving(self) -> Iterator[Serve]:
        """Do as `generating` for requests that come one by one; on a slow way each batch waits for the one before."""
        with self._occupied(), self.weights():
            longest = self.context or self._limits.max_cache_tokens or _UNLIMITED_CONTEXT
            paged = self.paged_generation()
            if paged is None:
                slow = self.slow_generation()
                with evaluation_mode(self._wrapped), slow.attention():
                    yield Serve(self, slow, longest)
                return
            try:
                with evaluation_mode(self._wrapped), self.modules.our_attention():
                    yield Serve(
                        self, paged, min(paged.reserve_for([longest] * self._limits.max_running), longest)
                    )
            finally:
                paged.close()

    @property
    def device(self) -> torch.device:
        """The device that was given, or else that of the parameters."""
        return self._device or next(self.model.parameters()).device

    @contextmanager
    def _occupied(self) -> Iterator[None]:
        """Allow one block at a time, because blocks share the model's modes."""
        assert not self._is_generating, "the model is in a block of generating() or serving() already"
        self._is_generating = True
        try:
            yield
        finally:
            self._is_generating = False

    def paged_generation(self) -> PagedGeneration | None:
        """Return a new generation loop without an arena; None if this model must take a slower way."""
        way = self.way()
        if way.shape is not None:
            return PagedGeneration(self.modules, way.shape, self.device, self._limits)
        if self.group.size > 1:
            raise GenerationError(
                f"{way.reason}: it generates in padded batches, which {self.group.size} processes cannot share",
                hint="set tensor_parallel.generation=1",
            )
        self.warn_once(f"{way.reason}: {SLOW_WAYS[way.slow]}")
        return None

    def limit_cache(self, num_tokens: int) -> None:
        """Hold at most so many tokens in the KV cache from the next block on."""
        self._limits = replace(self._limits, max_cache_tokens=num_tokens)

    def slow_generation(self) -> SlowGeneration:
        """Return the generation of a model for which `paged_generation` gives None."""
        return SlowGeneration(self.model, self.way().slow, batch_size=_PADDED_BATCH)

    def way(self) -> Way:
        """Return the way to generate, found at the first call for each precision."""
        dtype = next(self.model.parameters()).dtype
        if dtype not in self._ways:
            self._ways[dtype] = find_way(self.modules, self.model, self.device)
        return self._ways[dtype]

    def warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)


class Serve:
    """The object that `serving()` yields: it answers requests that come one by one."""

    def __init__(
        self, engine: HybridEngine, generation: PagedGeneration | SlowGeneration, max_tokens: int
    ) -> None:
        self._engine = engine
        self._generation = generation
        self.max_tokens = max_tokens
        """The most tokens of prompt and answer together: the context, or what the KV cache holds if less."""

    def expect_usable(self, answer: Answer, decode_text: DecodeText | None) -> None:
        """Raise GenerationError unless the answer may be handed over by the source."""
        listener = Listener(decode_text=decode_text)
        expect_usable(answer, vocabulary=self._engine.vocabulary, context=self.max_tokens, listener=listener)
        if answer.max_tokens > self.max_tokens:
            raise GenerationError(
                f"prompt and answer together may take {answer.max_tokens} tokens, and there is room for "
                f"{self.max_tokens}",
                hint=f"ask for at most {self.max_tokens - len(answer.prompt)} new tokens",
            )

    def prompt_scores(self, token_ids: Sequence[int], count: int) -> list[TokenScore]:
        """Return `prompt_scores` of the model; only the thread that answers may call this, between two steps."""
        return prompt_scores(self._engine.model, token_ids, count=count, device=self._engine.device)

    def __call__(self, source: Source, *, decode_text: DecodeText | None = None) -> None:
        """Answer what the source hands over until it ends. One call at a time."""
        self._generation.serve(source, Listener(decode_text=decode_text))


class _EnoughError(Exception):
    """A rehearsal has seen a token of a decode step."""


class Generate:
    """The object that `generating()` yields: it answers lists of prompts until the block ends."""

    def __init__(self, engine: HybridEngine) -> None:
        self._engine = engine
        self._paged = engine.paged_generation()
        self._is_open = True

    def attention(self) -> AbstractContextManager[None]:
        """Return a context with the attention that this way of generating needs."""
        if self._paged is None:
            return self._engine.slow_generation().attention()
        return self._engine.modules.our_attention()

    def close(self) -> None:
        """Free the arena."""
        if self._paged is not None:
            self._paged.close()
        self._paged = None
        self._is_open = False

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        *,
        seeds: Sequence[int],
        on_token: OnToken | None = None,
        decode_text: DecodeText | None = None,
    ) -> list[Completion]:
        """Answer every prompt. `sampling`: one for all, or one each.

        Where memory runs out, the KV cache is halved and the answers begin anew, unless `on_token` has seen some.

        The answer to one request depends on weights, prompt, sampling and seed alone, whatever runs beside it
        (up to rounding: another batch may add up in another order).
        """
        assert self._is_open, "generate() outlived its `with engine.generating()` block"
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        listener = Listener(on_token, decode_text)
        return self._answer(prompts, settings, seeds, listener, may_retry=on_token is None)

    def rehearse(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> None:  # fmt: skip
        """Read every prompt and decode a token for each, with room for whole answers; drop what was drawn."""
        seen: set[int] = set()

        def stop_after_a_step(index: int, token_id: int, logprob: float) -> None:
            if index in seen and len(seen) == len(prompts):
                raise _EnoughError
            seen.add(index)

        with suppress(_EnoughError):
            listener = Listener(stop_after_a_step)
            self._answer(prompts, [sampling] * len(prompts), seeds, listener, may_retry=True)

    def _answer(
        self,
        prompts: Sequence[Sequence[int]],
        settings: Sequence[Sampling],
        seeds: Sequence[int],
        listener: Listener,
        *,
        may_retry: bool,
    ) -> list[Completion]:
        """Answer every prompt, in a smaller KV cache where memory runs out. Other ranks of a group cannot retry."""
        while True:
            answers = [
                Answer(index, tuple(prompt), setting, seed, setting.max_new_tokens)
                for index, (prompt, setting, seed) in enumerate(zip(prompts, settings, seeds, strict=True))
            ]
            for answer in answers:
                expect_usable(
                    answer,
                    vocabulary=self._engine.vocabulary,
                    context=self._engine.context,
                    listener=listener,
                )
            self._cap(answers, self._engine.context, "the model's context")
            try:
                if answers:
                    self._run(answers, listener)
                return [answer.completion() for answer in answers]
            except (RuntimeError, MemoryError) as error:
                if (
                    not is_out_of_memory(error)
                    or not may_retry
                    or self._paged is None
                    or self._engine.group.size > 1
                ):
                    raise
                reason = str(error).split("\n")[0]
            # Outside the except block the traceback is gone, and with it the frames that held activations.
            self._halve_cache(max(answer.max_tokens for answer in answers), reason)

    def _halve_cache(self, longest: int, reason: str) -> None:
        """Go on with half of the KV cache, but with room for the longest answer, here and in later blocks."""
        assert self._paged is not None
        held = self._paged.capacity
        kept = max(held // 2, pages_for(longest) * PAGE_TOKENS)
        self._paged.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if kept >= held:
            raise GenerationError(
                f"generating one answer of {longest} tokens with its prompt does not fit in memory ({reason})",
                hint="lower ppo.sampling.max_new_tokens, set ppo.offload_while_generating=true, or use a smaller model",
            )
        warn(
            f"out of memory while generating: KV cache halved from {held} to {kept} tokens; fewer answers run at once, "
            "and results do not depend on it"
        )
        self._engine.limit_cache(kept)
        self._paged = self._engine.paged_generation()

    def serve(self, longest: Sequence[int]) -> Serve:
        """Return what answers requests that come one by one.

        longest: the most tokens, with their prompts, of each of the requests that may run at once.
        """
        assert self._is_open, "serve() outlived its `with engine.generating()` block"
        if self._paged is None:
            return Serve(self._engine, self._engine.slow_generation(), max(longest))
        capacity = self._paged.reserve_for(longest)
        return Serve(self._engine, self._paged, min(capacity, max(longest)))

    def _run(self, answers: list[Answer], listener: Listener) -> None:
        if self._paged is None:
            self._engine.slow_generation().run(answers, listener)
            return
        capacity = self._paged.reserve(answers)
        for answer in answers:
            if (length := len(answer.prompt)) >= capacity:
                raise GenerationError(
                    f"request {answer.index}: the prompt has {length} tokens, the KV cache holds {capacity}",
                    hint="shorten it, raise max_cache_tokens, or free memory on the device",
                )
        self._cap(answers, capacity, "the KV cache")
        self._engine.counts = self._paged.run(answers, listener)

    def _cap(self, answers: list[Answer], limit: int | None, what: str) -> None:
        """Shorten what would outgrow the limit; such answers end with "length"."""
        for answer in answers:
            if limit is not None and answer.max_tokens > limit:
                answer.max_new_tokens = limit - len(answer.prompt)
                self._engine.warn_once(
                    f"answers that would outgrow {what} of {limit} tokens are cut off there"
                )
