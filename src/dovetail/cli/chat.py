"""`dovetail chat`: a conversation with a finished model in the terminal.

Responsible for: turns, commands, fitting a long conversation into the context and saying so, showing an
answer while it is sampled. Not responsible for: sampling tokens (engine/), role markers (text/chat_format.py),
loading (serving/inference/).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Protocol

import typer

from dovetail.errors import DovetailError, GenerationError
from dovetail.runs.run_models import model_folder
from dovetail.text.message import Message

COMMANDS = """/reset         forget the conversation
/undo          take back the last question and its answer
/system TEXT   set the system prompt; without TEXT, show it
/save FILE     add the conversation to FILE as one JSON line that `dovetail sft` can learn from
/help          this list
/quit          leave (Ctrl-D does too; Ctrl-C stops an answer)"""


class Speaker(Protocol):
    """The parts of a model that a conversation needs; tests use one that has no weights."""

    context: int
    """The largest number of tokens of prompt and answer together."""
    max_new_tokens: int

    def num_tokens(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of the conversation as the model reads it before an answer."""
        ...

    def speak(self, messages: Sequence[Message], *, turn: int, on_text: Callable[[str], None]) -> str:
        """Sample an answer, show its pieces as they come, and return all of it."""
        ...


@dataclass(slots=True)
class Conversation:
    """The messages so far, and the model that answers."""

    speaker: Speaker
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    num_forgotten: int = 0
    """Number of the oldest messages that the model no longer sees."""

    def ask(self, question: str, on_text: Callable[[str], None], notice: Callable[[str], None]) -> str:
        """Ask a question and return the answer. If that fails, the conversation stays as it was."""
        self.turns.append({"role": "user", "content": question})
        try:
            messages = self._fitting_messages(notice)
            answer = self.speaker.speak(messages, turn=len(self.turns), on_text=on_text)
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def undo(self) -> bool:
        """Take back the last question and answer; False if there is none."""
        had_turns = bool(self.turns)
        del self.turns[-2:]
        self.num_forgotten = min(self.num_forgotten, len(self.turns))
        return had_turns

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.turns.clear()
        self.num_forgotten = 0

    def messages(self, *, start: int = 0) -> list[Message]:
        """Return the system prompt and the turns from `start` on."""
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns[start:]

    def save(self, file: Path) -> None:
        """Append the conversation as one JSON line with a `messages` column."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"messages": self.messages()}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DovetailError(
                f"{file}: cannot be written: {error.strerror}", hint="/save another file"
            ) from error

    def _fitting_messages(self, notice: Callable[[str], None]) -> list[Message]:
        """Return the newest turns that leave room for an answer; whole exchanges are left out, oldest first."""
        room = self.speaker.context - self.speaker.max_new_tokens
        start = self.num_forgotten
        while (num_tokens := self.speaker.num_tokens(self.messages(start=start))) > room:
            if start + 2 >= len(self.turns):
                raise GenerationError(
                    f"the question takes {num_tokens} tokens; with {self.speaker.max_new_tokens} for "
                    f"the answer that is more than the model's context of {self.speaker.context}",
                    hint="shorten the question or the system prompt, or lower --max-new-tokens",
                )
            start += 2
        if start > self.num_forgotten:
            notice(f"the conversation outgrew the model's context: its first {start} messages are left out")
            self.num_forgotten = start
        return self.messages(start=start)


@dataclass(slots=True)
class Terminal:
    """The input and output of a conversation; tests use their own."""

    read: Callable[[str], str] = input
    write: Callable[[str], None] = field(default=lambda text: typer.echo(text, nl=False))

    def line(self, text: str = "") -> None:
        """Write one line of output."""
        self.write(text + "\n")


def converse(conversation: Conversation, terminal: Terminal) -> None:
    """Read questions and show answers until the user leaves."""
    terminal.line("Type a question; /help lists the commands.")
    while True:
        try:
            text = terminal.read("Human: ").strip()
        except (EOFError, KeyboardInterrupt):
            terminal.line()
            return
        if text == "/quit":
            return
        if not text:
            continue
        try:
            if text.startswith("/"):
                obey(text, conversation, terminal)
            else:
                show_answer(text, conversation, terminal)
        except KeyboardInterrupt:
            terminal.line("\n(stopped; the question is taken back)")
        except DovetailError as error:
            terminal.line(f"\n{error}")


def show_answer(question: str, conversation: Conversation, terminal: Terminal) -> None:
    """Ask a question and show the answer as it comes; notices are printed on lines of their own before it."""
    has_begun = False

    def show(text: str) -> None:
        nonlocal has_begun
        terminal.write(text if has_begun else f"Assistant: {text}")
        has_begun = True

    conversation.ask(question, show, lambda note: terminal.line(f"({note})"))
    terminal.line("" if has_begun else "Assistant:")


def obey(text: str, conversation: Conversation, terminal: Terminal) -> None:
    """Carry out one /command."""
    command, _, rest = text.partition(" ")
    rest = rest.strip()
    match command:
        case "/reset":
            conversation.reset()
            terminal.line("(forgotten)")
        case "/undo":
            terminal.line("(taken back)" if conversation.undo() else "(nothing to take back)")
        case "/system":
            conversation.system = rest or conversation.system
            terminal.line(f"(system prompt: {conversation.system or 'none'})")
        case "/save" if rest:
            conversation.save(Path(rest).expanduser())
            terminal.line(f"(saved to {rest})")
        case "/save":
            terminal.line("(say where: /save FILE)")
        case "/help":
            terminal.line(COMMANDS)
        case _:
            terminal.line(f"(unknown command {command}; /help lists the commands)")


def chat(
    path: Annotated[str, typer.Argument(help="A run folder, a model folder, a .gguf file or a hub name.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="Answer this and leave; only the answer goes to stdout."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 always takes the likeliest word; higher is more varied.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the likeliest words that make up this share.")
    ] = 0.95,
    top_k: Annotated[
        int | None,
        typer.Option(min=1, help="Draw from this many of the likeliest words.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    seed: Annotated[int, typer.Option(help="The same seed and words give the same answers.")] = 0,
    device: Annotated[str, typer.Option(help="cuda, cpu, or auto.")] = "auto",
) -> None:
    """Talk to a model: multi-turn, streaming.

      dovetail chat runs/opt-1.3b
      dovetail chat HuggingFaceTB/SmolLM2-135M-Instruct --prompt "What is a dovetail joint?"

    In the conversation: /reset /undo /system /save FILE /help /quit.
    """
    from dovetail.cli.chat_model import ModelSpeaker  # here and not above: it imports torch
    from dovetail.engine.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, max_new_tokens=max_new_tokens)
    found = model_folder(path)
    typer.echo(f"loading {found}", err=True)
    conversation = Conversation(ModelSpeaker(found, sampling, seed=seed, device=device), system)
    if prompt is not None:
        conversation.ask(
            prompt, lambda text: typer.echo(text, nl=False), lambda note: typer.echo(note, err=True)
        )
        typer.echo()
        return
    _edit_lines()
    converse(conversation, Terminal())


def _edit_lines() -> None:
    """Switch on arrow keys and history at the prompt, where the platform has them."""
    try:
        import readline  # noqa: F401 (importing it is what switches it on)
    except ImportError:
        return
