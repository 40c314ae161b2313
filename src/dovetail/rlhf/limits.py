"""Compare what a model can read with what it is about to be given.

Responsible for: errors with names and numbers where a module would read positions or embedding rows out of
bounds, which on a GPU is an assertion that names nothing.
Not responsible for: prompts of the generator (engine/), rows of data sets (stages/parts.py).
"""

from typing import Any

from dovetail.engine.modules import context_in, context_of, vocabulary_of
from dovetail.errors import ConfigError, ModelError
from dovetail.model.forward import plain_model
from dovetail.model.rope import rope_limit_in


def expect_room(role: str, config: Any, *, max_prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise ConfigError if the longest prompt with the longest answer is longer than the role's context.

    config: the model's. A rope that changes with the length ends the context of an answer, as its first tokens would be
    drawn with other numbers than they are learnt from.
    """
    limit = context_in(config)
    if limit is not None and max_prompt_tokens + max_new_tokens > limit:
        raise ConfigError(
            f"data.max_prompt_tokens = {max_prompt_tokens} and ppo.sampling.max_new_tokens = {max_new_tokens} "
            f"make {max_prompt_tokens + max_new_tokens} tokens; the context of the {role} is {limit}",
            hint=f"lower one of the two, so that together they are {limit} or less, or take a model with a "
            "longer context",
        )
    short = rope_limit_in(config)
    if short is not None and max_prompt_tokens + max_new_tokens > short:
        raise ConfigError(
            f"data.max_prompt_tokens = {max_prompt_tokens} and ppo.sampling.max_new_tokens = {max_new_tokens} "
            f"make {max_prompt_tokens + max_new_tokens} tokens; the rope of the {role} has other frequencies beyond "
            f"{short}, so an answer would be learnt from with other numbers than it was drawn with",
            hint=f"lower one of the two, so that together they are {short} or less",
        )


def expect_readable(role: str, model: Any, *, longest: int, highest_id: int) -> None:
    """Raise ModelError if a sequence is longer than the model's context, or a token beyond its embedding."""
    inner = plain_model(model)
    limit, rows = context_of(inner), vocabulary_of(inner)
    if limit is not None and longest > limit:
        raise ModelError(
            f"a prompt with its answer has {longest} tokens; the context of the {role} "
            f"({type(inner).__name__}) is {limit}",
            hint="shorten prompts (data.max_prompt_tokens) or answers (ppo.sampling.max_new_tokens), or take a "
            f"{role} with a longer context",
        )
    if highest_id >= rows:
        raise ModelError(
            f"an answer holds the token id {highest_id}; the embedding of the {role} ({type(inner).__name__}) "
            f"has {rows} rows",
            hint="take models of one family, or make room: model.resize_token_embeddings(n) with the larger n",
        )
