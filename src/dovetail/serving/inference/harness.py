"""A model for lm-evaluation-harness (lm_eval), whose tasks then run on the packed forward and the engine.

Responsible for: log-likelihoods of continuations and of whole texts, and greedy or sampled continuations, as lm_eval's
own class for transformers defines them. Not responsible for: the tasks, and models behind a server (serving/routes.py).

    from lm_eval import simple_evaluate
    results = simple_evaluate(model=HarnessModel("runs/demo"), tasks=["hellaswag", "gsm8k"])

Shapes: T packed tokens, A tokens that are scored, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.batches import PackedBatch, pack, share_prompts
from dovetail.engine import Sampling
from dovetail.errors import ConfigError
from dovetail.model.forward import hidden_states, masked_index
from dovetail.model.linear_logprobs import head_of
from dovetail.rlhf.roles import over_tokens
from dovetail.runs.run_models import model_folder
from dovetail.serving.inference.loading import load_chat

try:
    from lm_eval.api.model import LM
except ImportError as missing:
    raise ConfigError(
        "the module lm_eval is not installed", hint='pip install "dovetail-rlhf[harness]"'
    ) from missing

MAX_NEW_TOKENS = 256
"""The longest continuation where a task names none, as in lm_eval."""
_FORWARD_TOKENS = 8192
_CHUNK_VALUES = 2**26
"""The number of logits that are held at once."""
_UNLIMITED_CONTEXT = 2048
"""The context assumed where a model names no limit, as in lm_eval."""


class HarnessModel(LM):  # type: ignore[misc]
    """A model by run folder, model folder, LoRA adapter, .gguf file or hub name."""

    def __init__(self, path: str, *, device: str = "auto") -> None:
        """Load the model. Raises ModelError if there is none, ConfigError if there is no such device."""
        super().__init__()
        loaded = load_chat(model_folder(path), device=device)
        self._model, self._chat, self._engine = loaded.model, loaded.chat, loaded.engine()
        self._device = loaded.device
        self._context = loaded.context or _UNLIMITED_CONTEXT
        tokenizer = loaded.chat.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        self._first: list[int] = [first]

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm_eval keeps prepared requests."""
        return self._chat.fingerprint

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text."""
        return str(
            self._chat.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template."""
        return str(self._chat.tokenizer.chat_template)

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """Return log p(continuation | context) for each pair, and whether greedy decoding gives the continuation."""
        return self._scored([self._encoded(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """Return log p(text) of each text, read in pieces as long as the context, each after one token before it."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            before, after = self._encoded("", request.args[0])
            ids = before + after
            step = self._context - 1
            for start in range(0, len(ids) - 1, step):
                windows.append((ids[start : start + 1], ids[start + 1 : start + 1 + step]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _is_greedy) in zip(owners, self._scored(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """Return the continuation of each context, up to one of the texts in `until`, which is left out."""
        prompts, settings = [], []
        for request in requests:
            context, wanted = request.args
            sampling = self._sampling(wanted)
            prompts.append(self._chat.text_ids(context)[-max(1, self._context - sampling.max_new_tokens) :])
            settings.append(sampling)
        with self._engine.generating() as generate:
            completions = generate(
                prompts, settings, seeds=range(len(prompts)), decode_text=self._chat.decode
            )
        texts = []
        for prompt, sampling, completion in zip(prompts, settings, completions, strict=True):
            stream = self._chat.text_stream(sampling.stop_strings, behind=prompt)
            texts.append(stream.add(completion.token_ids) + stream.finish())
        return texts

    def _sampling(self, wanted: dict[str, Any]) -> Sampling:
        """Return the settings of a request; without `do_sample` it is greedy."""
        until = wanted.get("until") or ()
        is_sampled = wanted.get("do_sample", False)
        return Sampling(
            max_new_tokens=min(wanted.get("max_gen_toks") or MAX_NEW_TOKENS, self._context - 1),
            temperature=float(wanted.get("temperature", 1.0)) if is_sampled else 0.0,
            top_p=wanted.get("top_p") if is_sampled else None,
            stop_strings=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
            stop_token_ids=self._chat.stop_token_ids,
        )

    def _encoded(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the tokens of both, parted where those of the context end; spaces there go to the continuation."""
        bare = context.rstrip()
        before = self._chat.text_ids(bare) if bare else self._first
        whole = self._chat.text_ids(context + continuation)
        if not bare:
            whole = before + (whole[1:] if whole[:1] == before else whole)
        return before, whole[len(before) :]

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Score continuations, each after its context, which is cut on the left where both are too long together."""
        if not pairs:
            return []
        kept = [(before[-max(1, self._context - len(after)) :], after) for before, after in pairs]
        sequences = [[*before, *after][-self._context :] for before, after in kept]
        lengths = [min(len(after), len(ids) - 1) for (_, after), ids in zip(kept, sequences, strict=True)]
        masks = [
            [place >= len(ids) - count for place in range(len(ids))]
            for ids, count in zip(sequences, lengths, strict=True)
        ]
        starts = [len(ids) - count for ids, count in zip(sequences, lengths, strict=True)]
        batch = share_prompts(pack(sequences, masks), starts).to(self._device)
        logprobs_T, greedy_T = over_tokens(batch, self._tokens_scored, _FORWARD_TOKENS)
        sums = [float(own_T.sum()) for own_T in logprobs_T.cpu().split_with_sizes(batch.lengths)]
        greedy = [bool(own_T.all()) for own_T in greedy_T.cpu().split_with_sizes(batch.lengths)]
        return list(zip(sums, greedy, strict=True))

    @torch.no_grad()
    def _tokens_scored(self, part: PackedBatch) -> tuple[Tensor, Tensor]:
        """Return the log-probability of each marked token and whether no token is likelier; 0 and True elsewhere."""
        index_A = masked_index(part)
        hidden_AD = hidden_states(self._model, part).index_select(0, index_A - 1)
        head, ids_A = head_of(self._model), part.token_ids_T[index_A]
        chunk = max(1, _CHUNK_VALUES // head.weight_VD.shape[0])
        logprobs, greedy = [], []
        for start in range(0, len(ids_A), chunk):
            logprobs_CV = head.logits(hidden_AD[start : start + chunk]).float().log_softmax(dim=-1)
            own_C = logprobs_CV.gather(1, ids_A[start : start + chunk, None]).squeeze(1)
            logprobs.append(own_C)
            greedy.append(own_C >= logprobs_CV.max(dim=-1).values)
        zeros_T = torch.zeros(part.num_tokens, device=hidden_AD.device)
        return (
            zeros_T.index_copy(0, index_A, torch.cat(logprobs)),
            (zeros_T == 0).index_copy(0, index_A, torch.cat(greedy)),
        )
