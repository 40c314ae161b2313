"""The Hugging Face modules as the engine calls them: packed ids and positions in, next-token logits out.

Responsible for: the forward call, the modes it needs (evaluation, Dovetail's attention) and restoring them, and
what a model's layers would cache, if they can be called in this way.
Not responsible for: attention (forward.py, forward.py), or models that cannot (padded.py).

On a GPU the fused step (fused.py), which reads the same parameters, decodes where it agrees with these modules.

Shapes: T packed tokens, S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dovetail.engine.kv_cache import KVShape
from dovetail.errors import GenerationError
from dovetail.model.attention import ATTENTION_NAME, AttentionCall, Layout, use_packed_attention
from dovetail.model.forward import evaluation_mode, vocabulary_of
from dovetail.model.linear_logprobs import head_of
from dovetail.model.lora import adapters_in_use
from dovetail.model.plain_forward import without_extras
from dovetail.model.rope import reread_at, rope_limit
from dovetail.parallel.tensor_plan import Place
from dovetail.parallel.world import WHOLE, TensorGroup


class PackedModules:
    """A model whose attention is Dovetail's registered function, hence works over packed batches."""

    def __init__(self, model: PreTrainedModel, group: TensorGroup = WHOLE) -> None:
        """Keep the model and `group`, the processes that compute it together if its weights are slices.

        Slices: parallel/tensor.py.
        """
        self.model = model
        self.group = group
        head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self.vocabulary = int(head.weight.shape[0]) if group.size == 1 else vocabulary_of(model)
        """The number of logits."""
        self._rows = [Place(rank, group.size).vocabulary(self.vocabulary)[1] for rank in range(group.size)]
        self.name = type(model).__name__
        self._without_extras = without_extras(model)
        self.rope_limit = rope_limit(model)
        """The longest sequence read with the rope of short ones; None if all lengths have the same rope."""
        self.cannot_be_captured = False
        """Whether its forward does what a CUDA graph cannot record; found by trying."""
        self.why_not_fused: str | None = None
        """The reason why the modules decode on a GPU, given in a warning when it was found (graphs.py)."""
        self.captured: Any = None
        """The decoder whose graphs were recorded from these modules, for the next block (graphs.py)."""

    def rereads_at(self, length: int) -> bool:
        """Return whether a sequence that grows to this length must be read anew, with other rope frequencies."""
        return self.rope_limit is not None and length > self.rope_limit and reread_at(self.model, length)

    def recorded_state(self) -> tuple[Any, ...]:
        """Return what a graph of the forward fixes: the addresses of weights and buffers, and the adapters in use."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        return tuple(tensor.data_ptr() for tensor in tensors), adapters_in_use(self.model)

    @contextmanager
    def our_attention(self) -> Iterator[None]:
        """Make the model attend through `layout.attend` within the block; restore its attention afterwards."""
        before = self.model.config._attn_implementation
        if before == ATTENTION_NAME:
            yield
            return
        use_packed_attention(self.model)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def next_logits(
        self, ids_T: Tensor, positions_T: Tensor, layout: Layout, last_S: Tensor | None = None
    ) -> Tensor:
        """Return logits [S, V] of what follows the tokens `last_S` (all T if None); only these go through the head."""
        if ids_T.is_cuda:
            # The head is that of training, whose product leaves the tensor cores in float32.
            hidden_TD = self._forward(self.model.base_model, ids_T, positions_T, layout).last_hidden_state[0]
            logits = head_of(self.model).logits(hidden_TD if last_S is None else hidden_TD[last_S])
        else:
            options = {"logits_to_keep": 0 if last_S is None else last_S, **self._without_extras}
            logits = self._forward(self.model, ids_T, positions_T, layout, **options).logits[0]
        return self.group.columns(logits, self._rows)

    def from_first(self, ids_S: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the results of `draw_next` in the group's first process, since sums may round otherwise in each."""
        if self.group.size == 1:
            return ids_S, numbers
        numbers = self.group.from_first(numbers.contiguous())
        return numbers[0].long(), numbers

    def _forward(
        self, module: Any, ids_T: Tensor, positions_T: Tensor, layout: Layout, **options: Any
    ) -> Any:
        return module(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            # transformers hands a mask of four dimensions through unread. Without one, its classes look for
            # packed sequences in the positions themselves, which waits for the device in every forward.
            attention_mask=torch.zeros(1, 1, 1, 1, device=ids_T.device),
            use_cache=False,
            layout=layout,
            **options,
        )

    def kv_shape(self) -> KVShape | None:
        """Return the sizes of one token's keys and values, found by running one; None if a layer bypasses the layout.

        Running the modules, not reading the config, proves for any architecture that each layer uses Dovetail's
        attention.
        """
        probe = _Probe()
        device = next(self.model.parameters()).device
        with torch.no_grad(), evaluation_mode(self.model), self.our_attention():
            zero_T = torch.zeros(1, dtype=torch.long, device=device)
            self.next_logits(zero_T, zero_T, probe)
        num_layers = self.model.config.get_text_config().num_hidden_layers
        if sorted(probe.shapes) != list(range(num_layers)) or len(set(probe.shapes.values())) != 1:
            return None
        heads, width, dtype = probe.shapes[0]
        return KVShape(num_layers=num_layers, num_heads=heads, head_width=width, dtype=dtype)


class _Probe:
    """A layout for one token that notes what each layer would store."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, torch.dtype]] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """Note the shapes, and return the value: that is attention of a token to itself alone."""
        if key.shape == value.shape:
            self.shapes[call.layer] = (key.shape[1], key.shape[3], key.dtype)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


def expect_causal_lm(model: PreTrainedModel) -> None:
    """Raise GenerationError for models without a next-token head."""
    if model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise GenerationError(
            f"{type(model).__name__} has no language-model head, so it cannot generate",
            hint="load it with AutoModelForCausalLM",
        )
