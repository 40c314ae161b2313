"""The parity gate, which compares the engine's numbers with the model's own forward before training.

Responsible for: a few greedy answers, their tokens and log-probabilities against the plain Hugging Face forward
of the same modules, the same for the packed training forward, alone where nothing is generated, and the first
layer that differs if they disagree.
Not responsible for: when to ask (rlhf/api.py, stages/supervised.py), the reference (model/plain_forward.py),
generating (hybrid.py), the training forward (model/forward.py).

The reference is each whole sequence alone. It shares the weights with what it judges, and nothing of Dovetail's
attention, packing, caching or head.

Shapes: T tokens of one sequence, A tokens of all answers, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.batches import PackedBatch, pack
from dovetail.engine.hybrid import HybridEngine
from dovetail.engine.sampling import Sampling
from dovetail.engine.scheduler import DecodeText
from dovetail.errors import ParityError
from dovetail.maths.masked import at_least_float32
from dovetail.model.forward import evaluation_mode, hidden_states, plain_model, token_logprobs, with_weights
from dovetail.model.plain_forward import (
    attention_restored,
    errors_T,
    first_difference,
    layer_outputs,
    plain_attention,
    plain_hidden_states,
    plain_logits,
)
from dovetail.model.shards import computing_device
from dovetail.model.tolerance import (
    TOLERANCES,
    Tolerance,
    first_beyond,
    is_exact,
    is_explained,
    nudged_embeddings,
)
from dovetail.parallel.shard import sharding_of

PROMPT_TOKENS = (24, 60, 120)
"""The lengths of the prompts, cut to their last tokens; the second one's answer outgrows a page of keys. The last
prompt is repeated instead where the reach of a run is known."""
NEW_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ParityReport:
    """The result of a passed gate."""

    num_tokens: int
    """The number of tokens generated and compared."""
    largest_gap: float
    """The largest difference, in nats, of a log-probability, of generation or training, to the reference's."""


@dataclass(frozen=True, slots=True)
class TrainingParityReport:
    """The result of a passed gate of a stage without generation."""

    num_tokens: int
    """The number of tokens compared."""
    largest_error: float
    """The norm of the difference of the last hidden state, as a fraction of its norm, at any token."""


_ANY_TOKEN = 10
"""The factor by which one token may be off more than the mean; a wrong forward is off by far more, at many."""

_HINT = (
    "training on these numbers would teach the wrong thing, so the run has not begun: this model is not supported with "
    "this config. Report this message with its config.json"
)


@dataclass(frozen=True, slots=True)
class _Token:
    """One generated token, with the numbers of the three forwards."""

    prompt: int
    place: int
    """The position of the token in the answer, from 0."""
    token_id: int
    best_id: int
    """The reference's choice."""
    shortfall: float
    """The gap of the reference's logits, that of `best_id` minus that of `token_id`."""
    plain: float
    """The log-probability of `token_id` in the reference; the next two are those of generation and training."""
    generated: float
    trained: float


@torch.no_grad()
def check_parity(
    engine: HybridEngine,
    prompts: Sequence[Sequence[int]],
    *,
    decode_text: DecodeText | None = None,
    trained: Any = None,
    reach: int | None = None,
) -> ParityReport:
    """Compare a few greedy answers to `prompts` (at most three are used) with the plain forward.

    Mode, attention, weights and gradients are restored. decode_text: quotes the prompt in errors.
    trained: the model whose training and plain forward are run, where engine and training do not have the same weights,
    but slices; peft-wrapped or not, sharded or not (then all processes must call this). By default the engine's own.
    reach: the most tokens of prompt and answer that the run may read; the last prompt is repeated up to there.
    Raises ParityError, naming the token and the first layer that differs.
    """
    model = engine.model if trained is None else plain_model(trained)
    tolerance = TOLERANCES[next(model.parameters()).dtype]
    room = math.inf if engine.context is None else max(1, engine.context - NEW_TOKENS)
    cut = _cut(prompts, room, reach)
    with evaluation_mode(model), attention_restored(model):
        # Processes that compute each layer together must run the same sequences.
        answers, generated = sharding_of(model).world.from_first_of_row(_generate(engine, cut))
        batch = _packed(cut, answers).to(computing_device(model))
        trained_A = token_logprobs(model, batch).logprobs_T[batch.mask_T].tolist()
        tokens = _beside_the_reference(model, cut, answers, [p for row in generated for p in row], trained_A)
        noise = None if is_exact(model.dtype) else _noise(model, cut, answers, tokens)
        wrong = _first_wrong(tokens, tolerance, attrgetter("generated"), noise)
        if wrong is not None:
            where = _trace_generation(engine, model, cut, wrong.prompt, tolerance)
            raise _parity_error(model, "generation", wrong, wrong.generated, cut, decode_text, where)
        wrong = _first_wrong(tokens, tolerance, attrgetter("trained"), noise)
        if wrong is not None:
            sequences = [[*prompt, *answer] for prompt, answer in zip(cut, answers, strict=True)]
            where = _trace_training(model, sequences, wrong.prompt, tolerance)
            raise _parity_error(model, "the training forward", wrong, wrong.trained, cut, decode_text, where)
    gaps = [abs(logprob - token.plain) for token in tokens for logprob in (token.generated, token.trained)]
    return ParityReport(len(tokens), max(gaps))


@torch.no_grad()
def check_training_parity(
    model: Any, sequences: Sequence[Sequence[int]], *, longest: Sequence[int] = ()
) -> TrainingParityReport:
    """Compare the packed training forward of a few `sequences` (at most three) with the plain forward.

    For models that do not generate; any that training runs, peft-wrapped or not, sharded or not, whatever its head.
    longest: another sequence, which is not cut. Mode, attention, weights and gradients are afterwards as before. Raises
    ParityError, naming the first layer that differs.
    """
    inner = plain_model(model)
    tolerance = TOLERANCES[next(inner.parameters()).dtype]
    cut = [list(ids)[:most] for ids, most in zip(sequences, PROMPT_TOKENS, strict=False)]
    cut += [list(longest)] if longest else []
    with evaluation_mode(model), attention_restored(inner):
        batch = _packed(cut, [[]] * len(cut)).to(computing_device(inner))
        packed_TD = hidden_states(model, batch)
        with plain_attention(inner):
            plain_TD = _plain_rows(model, cut)
            noise_T = None
            if not is_exact(inner.dtype):
                with nudged_embeddings(inner):
                    noise_T = errors_T(_plain_rows(model, cut), plain_TD)
        error_T = errors_T(packed_TD, plain_TD)
        worst = _wrong_hidden_state(error_T, noise_T, tolerance)
        if worst is not None:
            index = next(i for i in range(len(cut)) if worst < sum(batch.lengths[: i + 1]))
            raise ParityError(
                f"{type(inner).__name__}: the training forward and the plain forward of the same modules disagree: "
                f"the last hidden state is off by {float(error_T[worst]):.1%} at token "
                f"{worst - sum(batch.lengths[:index])} of row {index}, by {float(error_T.mean()):.1%} on average. "
                f"{_trace_training(inner, cut, index, tolerance)}.",
                hint=_HINT,
            )
    return TrainingParityReport(batch.num_tokens, float(error_T.max()))


def _plain_rows(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    inner = plain_model(model)
    return with_weights(model, lambda: torch.cat([plain_hidden_states(inner, ids) for ids in rows]))


def _wrong_hidden_state(error_T: Tensor, noise_T: Tensor | None, tolerance: Tolerance) -> int | None:
    """Return the first token that is off by too much; if all are only a little off, the worst of too many."""
    wrong = first_beyond(error_T, _ANY_TOKEN * tolerance.hidden, noise_T)
    if wrong is None and not is_explained(error_T, tolerance.hidden, noise_T):
        wrong = int(error_T.argmax())
    return wrong


def _cut(prompts: Sequence[Sequence[int]], room: float, reach: int | None) -> list[list[int]]:
    """Return the ends of the prompts, the last one repeated up to what the run may read before its last tokens."""
    cut = [
        list(prompt)[-int(min(most, room)) :] for prompt, most in zip(prompts, PROMPT_TOKENS, strict=False)
    ]
    if reach is not None:
        length, last = int(min(max(1, reach - NEW_TOKENS), room)), list(prompts[len(cut) - 1])
        cut[-1] = (last * (length // len(last) + 1))[:length]
    return cut


def _generate(
    engine: HybridEngine, prompts: Sequence[Sequence[int]]
) -> tuple[list[list[int]], list[list[float]]]:
    """Generate greedy answers; return them and the engine's log-probabilities of their tokens."""
    with engine.generating() as generate:
        found = generate(
            prompts, Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0), seeds=range(len(prompts))
        )
    return [list(answer.token_ids) for answer in found], [list(answer.logprobs) for answer in found]


def _packed(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> PackedBatch:
    pairs = list(zip(prompts, answers, strict=True))
    return pack(
        [[*prompt, *answer] for prompt, answer in pairs],
        [[False] * len(prompt) + [True] * len(answer) for prompt, answer in pairs],
    )


def _beside_the_reference(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    generated_A: Sequence[float],
    trained_A: Sequence[float],
) -> list[_Token]:
    """Return every generated token with the plain forward's numbers."""
    tokens: list[_Token] = []
    with plain_attention(model):
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            logits_NV = _answer_logits(model, prompt, answer)
            ids_N1 = torch.tensor(answer, device=logits_NV.device)[:, None]
            best_N, best_ids_N = logits_NV.max(dim=-1)
            columns = zip(
                answer,
                best_ids_N.tolist(),
                (best_N - logits_NV.gather(1, ids_N1)[:, 0]).tolist(),
                logits_NV.log_softmax(dim=-1).gather(1, ids_N1)[:, 0].tolist(),
                strict=True,
            )
            for place, (token_id, best_id, shortfall, plain) in enumerate(columns):
                at = len(tokens)
                logprobs = (plain, generated_A[at], trained_A[at])
                tokens.append(_Token(index, place, token_id, best_id, shortfall, *logprobs))
    return tokens


def _answer_logits(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Return the plain forward's logits [N, V] from which each token of the answer is chosen."""
    # The last row predicts a token that was not generated.
    kept_NV = plain_logits(model, [*prompt, *answer], last=len(answer) + 1)
    return at_least_float32(kept_NV)[:-1]


def _noise(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    tokens: Sequence[_Token],
) -> Tensor:
    """Return how far, in nats, the plain log-probabilities move when the embeddings change in their last bit."""
    with plain_attention(model), nudged_embeddings(model):
        nudged = [
            _answer_logits(model, prompt, answer)
            .log_softmax(dim=-1)
            .gather(1, torch.tensor(answer, device=computing_device(model))[:, None])[:, 0]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    return (torch.cat(nudged).cpu() - torch.tensor([token.plain for token in tokens])).abs()


def _first_wrong(
    tokens: Sequence[_Token],
    tolerance: Tolerance,
    logprob_of: Callable[[_Token], float],
    noise_A: Tensor | None,
) -> _Token | None:
    """Return the first token that rounding cannot explain; if all are only a little off, the worst of too many."""
    gaps_A = torch.tensor([abs(logprob_of(token) - token.plain) for token in tokens])
    far_A = torch.maximum(gaps_A, torch.tensor([token.shortfall for token in tokens]))  # keeps NaN
    wrong = first_beyond(far_A, tolerance.largest, noise_A)
    if wrong is None and not is_explained(gaps_A, tolerance.mean, noise_A):
        wrong = int(gaps_A.argmax())
    return None if wrong is None else tokens[wrong]


def _parity_error(
    model: PreTrainedModel,
    source: str,
    token: _Token,
    logprob: float,
    prompts: Sequence[Sequence[int]],
    decode_text: DecodeText | None,
    where: str,
) -> ParityError:
    def spelled(ids: Sequence[int]) -> str:
        return repr(decode_text(ids)) if decode_text else " ".join(map(str, ids))

    prompt = prompts[token.prompt]
    return ParityError(
        f"{type(model).__name__}: {source} and the plain forward of the same modules disagree at token "
        f"{token.place} of the answer to prompt {token.prompt} ({len(prompt)} tokens, ending in "
        f"{spelled(prompt[-8:])}). Token {token.token_id} ({spelled([token.token_id])}) was chosen, with "
        f"log-probability {logprob:.4f}; the plain forward gives it {token.plain:.4f}, and its own choice is "
        f"token {token.best_id} ({spelled([token.best_id])}), {token.shortfall:.4f} nats likelier. {where}.",
        hint=_HINT,
    )


def _trace_generation(
    engine: HybridEngine,
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    index: int,
    tolerance: Tolerance,
) -> str:
    """Generate the answer again, alone, and name the first layer that differs from the plain forward of `model`."""
    prompt = prompts[index]
    with engine.generating() as generate, layer_outputs(engine.model) as calls:
        sampling = Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0)
        (answer,) = generate([prompt], sampling, seeds=[index])
    # A captured graph replays kernels without calling modules: only what was really called can be compared.
    is_whole = all(len(found) == len(answer.token_ids) for found in calls.values())
    seen = {
        name: torch.cat(
            [found[0].flatten(0, 1)[: len(prompt)]]
            + [step.flatten(0, 1)[:1] for step in found[1:] if is_whole]
        )
        for name, found in calls.items()
        if found
    }
    different = first_difference(model, [*prompt, *answer.token_ids], seen, largest=tolerance.hidden)
    if different is not None:
        return different
    what = "prompt and answer" if is_whole else "the prompt (decoding does not call the layers one by one)"
    return (
        f"No layer differs over {what} when this prompt runs alone: look at what follows the layers (head, "
        "draw), and at sequences that share a batch"
    )


def _trace_training(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], index: int, tolerance: Tolerance
) -> str:
    """Run the packed batch again and name the first layer that differs in this sequence."""
    batch = _packed(sequences, [[]] * len(sequences)).to(computing_device(model))
    with layer_outputs(model) as calls:
        hidden_states(model, batch)
    start, length = sum(batch.lengths[:index]), batch.lengths[index]
    seen = {
        name: found[0][0, start : start + length] if len(found[0]) == 1 else found[0][index, :length]
        for name, found in calls.items()
        if found
    }
    found = first_difference(model, sequences[index], seen, largest=tolerance.hidden)
    return found or "No layer differs: look at what follows the layers"
