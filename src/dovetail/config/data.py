"""The sources of rows, how they become records, and which stage sees which.

Responsible for: the settings of the data layer. Not responsible for: reading (data/sources.py).
"""

import codecs
import re
from string import Formatter
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from dovetail.config.frozen import FrozenModel

Share = Annotated[float, Field(ge=0)]
DEFAULT_SPLIT = (2.0, 4.0, 4.0)
_FORM_COLUMNS = ("messages", "prompt", "chosen", "answers", "text")


class SourceConfig(FrozenModel):
    """One table of rows and the columns to take from it.

    Give the columns of one form; what a source can serve follows from them:
    `messages` or `prompt` + `response` (demonstrations), `prompt` alone (prompts), `chosen` + `rejected`
    with or without `prompt` (comparisons), `answers` + `preference` or `scores` or `ranks` (k-way
    comparisons), `text` (plain text). Without any of them, columns of these names are looked for.

    A column is a name, or a path into nested values: `question.full_text`, `passages[0].text`,
    `completions[].text` (a list of all), `rejected?` (may be absent).
    """

    advanced: ClassVar[frozenset[str]] = frozenset(
        {
            "revision",
            "encoding",
            "preference_values",
            "tie_values",
            "ranks",
            "margin",
            "system",
            "history",
            "transcript",
            "transcript_names",
            "remove",
            "limit",
            "stages",
            "held_out",
        }
    )

    path: str
    """A registered name (rm-static), a file (.json .jsonl .jsonl.gz .parquet .csv .xlsx), a folder saved with
    `save_to_disk`, a hub name, `dataset_info.json:NAME` for a set that LLaMA-Factory describes, or `labels:` and the
    URL of a database of labels (labels:sqlite:///labels.db)."""
    name: str | None = None
    """Configuration of a hub data set, or project of a database of labels."""
    revision: str | None = None
    """Branch, tag or commit of a hub data set; `refs/convert/parquet` for sets that come with a script."""
    split: str = "train"
    """Split of a hub or saved data set."""
    encoding: str = "utf-8"
    """Encoding of a file of text, such as gb18030 or utf-16; by default UTF-8, with or without a byte order mark."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share in the blend, relative to the other sources, whatever their sizes; 1 where only others have one.
    Without any weights every row is used once per epoch. Where a source gives only some of its rows, they
    are drawn once for the run, with `data.seed`, and not anew for each epoch."""
    messages: str | None = None
    """Column holding a list of chat messages, each with `role` and `content` (or `from` and `value`)."""
    prompt: tuple[str, ...] | str | None = None
    """Column holding the prompt: text, an Anthropic transcript, or a list of messages. Several columns of text, such
    as [instruction, "input?"], are joined by a blank line; empty ones are left out. Braces make a template:
    "{question}\\nAnswer in {language}."."""
    response: str | None = None
    """Column holding the demonstrated answer."""
    chosen: str | None = None
    """Column holding the preferred answer, or the whole transcript or message list that ends with it."""
    rejected: str | None = None
    """Column holding the other answer, in the same form as `chosen`."""
    answers: tuple[str, ...] | str | None = None
    """Columns holding one answer each, or one column holding a list of answers."""
    preference: str | None = None
    """Column naming the better of two `answers`: `preference_values` tells how."""
    preference_values: tuple[Any, Any] = (1, 2)
    """Values of `preference` that mean the first and the second answer; a number between them counts for the
    nearer one, the middle is a tie."""
    tie_values: tuple[Any, ...] = ("tie", 0)
    """Further values of `preference` that mean that neither answer is better."""
    scores: tuple[str, ...] | str | None = None
    """Columns with one number per answer, or one column with a list: higher is better."""
    ranks: tuple[str, ...] | str | None = None
    """Columns as for `scores`, where lower is better."""
    margin: str | None = None
    """Column with how much better the chosen answer is (Llama 2, section 3.2.2); used by the ranking loss."""
    text: str | None = None
    """Column with plain text, for pretraining and mixture training."""
    system: str | None = None
    """Column with a system message, put before the prompt."""
    history: str | None = None
    """Column with earlier turns, put before the prompt: a list of pairs of question and answer, as in Alpaca's
    `history`, or of messages."""
    transcript: bool | None = None
    """The text columns hold Anthropic transcripts: "\\n\\nHuman: ...\\n\\nAssistant: ...". By default a row does whose
    prompt or chosen answer begins with one of the two names, and every row where `transcript_names` gives others."""
    transcript_names: tuple[str, str] = ("Human", "Assistant")
    """Names of user and assistant in transcripts. These two stand behind a blank line; others, such as
    USER and ASSISTANT, behind any white space."""
    remove: str | None = None
    """Regular expression whose matches are taken out of answers, such as marks of citations."""
    limit: PositiveInt | None = None
    """Use only this many rows: those with the smallest row hash, so the choice is stable."""
    stages: tuple[Literal["sft", "reward", "ppo"], ...] | None = None
    """Give all rows to each of these stages, instead of dividing them by `data.stage_split`."""
    held_out: bool | None = None
    """True: all rows are held out for evaluation. False: none. By default `held_out_fraction` of them."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_string(cls, value: Any) -> Any:
        """Return the source as written in recipes and on the command line."""
        return spelt_out(value) if isinstance(value, str) else value

    def names_columns(self) -> bool:
        """Return whether the source says what its columns hold; else they are guessed from common names."""
        return any(getattr(self, name) is not None for name in (*_FORM_COLUMNS, "response", "rejected"))

    @model_validator(mode="after")
    def _columns_make_one_form(self) -> "SourceConfig":
        for problem, is_so in (
            ("response needs prompt: name the column that it answers", self.response and not self.prompt),
            (
                "chosen and rejected need each other: name both columns",
                bool(self.chosen) != bool(self.rejected),
            ),
            ("answers needs prompt: name the column that they answer", self.answers and not self.prompt),
            ("margin belongs to chosen and rejected, or answers", self.margin and not self._compares()),
        ):
            if is_so:
                raise ValueError(problem)
        forms = [
            name for name in ("messages", "response", "chosen", "answers", "text") if getattr(self, name)
        ]
        if len(forms) > 1:
            raise ValueError(f"{' and '.join(forms)} are different forms of rows: name the columns of one")
        judged = [name for name in ("preference", "scores", "ranks") if getattr(self, name)]
        if len(judged) != (1 if self.answers else 0):
            named = " and ".join(judged) or "none of them"
            raise ValueError(f"answers go with one of preference, scores and ranks; here with {named}")
        return self

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, value: str) -> str:
        try:
            codecs.lookup(value)
        except LookupError as error:
            raise ValueError(
                f"encoding = {value!r} is not known; write utf-8, gb18030, utf-16 ..."
            ) from error
        return value

    @field_validator("prompt")
    @classmethod
    def _template_is_whole(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        """Return the prompt; a template has columns and nothing else in its braces."""
        if isinstance(value, str) and "{" in value:
            try:
                parts = list(Formatter().parse(value))
            except ValueError as error:
                raise ValueError(
                    f"prompt = {value!r} is no template: {error}; write {{{{ for a brace"
                ) from error
            if any(name == "" or spec or conversion for _, name, spec, conversion in parts):
                raise ValueError(
                    f"prompt = {value!r} is no template: braces hold the name of a column alone, such as {{question}}"
                )
        return value

    @model_validator(mode="after")
    def _patterns_are_patterns(self) -> "SourceConfig":
        if self.remove is not None:
            try:
                re.compile(self.remove)
            except re.error as error:
                raise ValueError(f"remove = {self.remove!r} is not a regular expression: {error}") from error
        return self

    def _compares(self) -> bool:
        return self.chosen is not None or self.answers is not None


class DataConfig(FrozenModel):
    """The blend, its split over the three stages, and what to do with rows that do not fit."""

    advanced: ClassVar[frozenset[str]] = frozenset(
        {"bad_rows", "split_by", "max_eval_rows", "seed", "cache_dir"}
    )

    blend: tuple[SourceConfig, ...] = ()
    """Sources of all three stages. In YAML and on the command line an item may be a short string,
    `name`, `file.jsonl` or `name:weight`."""
    stage_split: tuple[Share, Share, Share] | None = None
    """Shares of the prompts that supervised fine-tuning, reward model and PPO see, disjointly; by default 2, 4, 4
    (DeepSpeed-Chat's) where a run has several stages, and all prompts for a stage that runs alone. A prompt keeps its
    stage whatever its answers, its file or the other sources."""
    pretraining: tuple[SourceConfig, ...] = ()
    """Plain text for mixture training (PPO-ptx), with a `text` column."""
    split_by: Literal["prompt", "row"] = "prompt"
    """The key of a row's stage, and of whether it is held out. prompt: a hash of the messages before the last
    answer, so that all answers to one prompt stay together and no prompt is held out and learnt from at once. row:
    a hash of prompt and answers, for a file whose rows answer only a few prompts."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the prompts whose rows are kept from training and used for evaluation."""
    max_eval_rows: PositiveInt = 256
    """The most held-out rows that an evaluation uses."""
    max_tokens: PositiveInt = 512
    """Longest prompt + answer in tokens; longer rows are handled by `too_long`."""
    max_prompt_tokens: PositiveInt = 256
    """Longest prompt in tokens for PPO; longer ones are handled by `too_long`."""
    too_long: Literal["drop", "truncate_left", "error"] = "drop"
    """Rows that are too long: leave out (counted and reported), cut the oldest part of the prompt away, or
    stop. An answer is never cut."""
    bad_rows: Literal["strict", "skip"] = "strict"
    """Rows that cannot be read: stop at the first with file, line and reason, or leave out, count and
    report."""
    seed: NonNegativeInt = 0
    """Seed of the draw where `weight` takes only some rows of a source, or some once more than others. The order
    of rows follows the run's `seed`."""
    cache_dir: str | None = None
    """Folder of the token cache; by default `dovetail` in the user's cache folder. Keyed by content."""

    @property
    def shares(self) -> tuple[float, float, float]:
        """Return the split over the stages that is in force."""
        return DEFAULT_SPLIT if self.stage_split is None else self.stage_split

    @model_validator(mode="after")
    def _some_stage_sees_rows(self) -> "DataConfig":
        if self.stage_split is not None and sum(self.stage_split) <= 0:
            raise ValueError("stage_split has no positive share; give at least one stage rows, such as 2,4,4")
        return self


def spelt_out(source: str) -> dict[str, str]:
    """Return the settings that `name`, `file.jsonl` or `name:weight` is short for."""
    path, _, weight = source.rpartition(":")
    return {"path": path, "weight": weight} if path and _is_number(weight) else {"path": source}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
