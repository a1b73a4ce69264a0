"""``tars chat``: a conversation at the terminal, or over a pipe, a line a turn."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import platformdirs

from tars_core.cli import answer, output
from tars_core.types.errors import ContextLengthExceeded, RequestError, StreamInterrupted
from tars_core.types.events import Finished, Started, TextDelta
from tars_core.types.failures import AllBackendsFailed
from tars_core.types.messages import Message
from tars_core.types.request import SamplingParams

if TYPE_CHECKING:
    from tars_core.cli.progress import LoadBar
    from tars_core.engine import InferenceEngine, Sampling

_PROMPT = "> "
_HISTORY_LINES = 1000
_HELP = """\
/new            forget the conversation
/system TEXT    set the system prompt and start anew; without TEXT, remove it
/stats          which backend answered last, and how fast
/help           this
/quit           leave (Ctrl-D too)
Ctrl-C stops an answer; what was said so far stays part of the conversation.
"""


class Conversation:
    """The turns so far, and the loop that asks for more."""

    def __init__(self, engine: InferenceEngine, bar: LoadBar, system: str | None, sampling: Sampling) -> None:
        self._engine = engine
        self._bar = bar
        self._sampling = sampling
        self._failed = False
        self._interactive = sys.stdin.isatty()
        self._stats = "no answer yet"
        self._turns: list[Message] = []
        self._begin(system)

    def run(self) -> bool:
        """Ask and answer until the end of the input, or ``/quit``; say whether every turn was answered.

        What cannot work at all is said before.
        """
        gc.enable()  # see main(): a conversation lasts
        SamplingParams(**self._sampling)  # type: ignore[arg-type]  # raises; the values are the command line's
        self._engine.plan()
        if self._interactive:
            click.secho("/help says what you can type; Ctrl-D ends.", err=True, dim=True)
        with _history() if self._interactive else contextlib.nullcontext():
            while (line := self._read()) is not None:
                if line.startswith("/"):
                    if not self._command(line):
                        break
                elif line.strip():
                    self._answer(line)
        return not self._failed

    def _begin(self, system: str | None) -> None:
        self._turns = [Message(role="system", content=system)] if system else []

    def _read(self) -> str | None:
        try:
            return input(_PROMPT if self._interactive else "")
        except EOFError:
            if self._interactive:
                click.echo(err=True)  # the prompt's line is still open
            return None
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            click.echo("\n(Ctrl-D or /quit leaves)", err=True)
            return ""

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        match name:
            case "/quit" | "/exit":
                return False
            case "/new":
                self._begin(next((turn.text for turn in self._turns if turn.role == "system"), None))
                click.secho("(a new conversation)", err=True, dim=True)
            case "/system":
                self._begin(rest.strip() or None)
                click.secho("(a new conversation)", err=True, dim=True)
            case "/stats":
                click.echo(self._stats, err=True)
            case "/help":
                click.echo(_HELP, err=True, nl=False)
            case _:
                click.echo(f"there is no {name}; /help lists what there is", err=True)
        return True

    def _answer(self, line: str) -> None:
        """Answer one turn. A turn that failed is taken back, one that was stopped stays with what it said."""
        said: list[str] = []
        cut = False
        self._turns.append(Message(role="user", content=line))
        try:
            with self._bar:
                cut = self._show(said)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            click.secho("  (stopped)", err=True, dim=True)
        except ContextLengthExceeded as error:
            self._failed = True
            click.secho(f"{error.message}; /new starts a new conversation", err=True, fg="red")
        except (RequestError, StreamInterrupted, AllBackendsFailed) as error:
            self._failed = True
            click.secho(f"\n{error}" if said else str(error), err=True, fg="red")
        if said:
            output.write("\n")
            if cut:
                click.secho("(truncated at --max-tokens, or the context is full)", err=True, dim=True)
            self._turns.append(Message(role="assistant", content="".join(said)))
        else:
            self._turns.pop()

    def _show(self, said: list[str]) -> bool:
        """Print the answer as it grows, and add it to ``said``; say whether it was cut."""
        for event in self._engine.stream(messages=self._turns, **self._sampling):
            match event:
                case Started(decision=decision) if decision.notice and len(self._turns) == 1:
                    click.secho(f"note: {decision.notice}", err=True, dim=True)
                case TextDelta(text=text):
                    self._bar.wipe()
                    said.append(text)
                    output.write(answer.shown(text))
                case Finished(completion=completion):
                    self._stats = answer.summary(completion)
                    return completion.finish_reason == "length"
        return False


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Let the arrow keys bring back what was typed, in earlier conversations too."""
    try:
        readline = importlib.import_module("readline")
    except ImportError:  # Windows: input() works without it
        yield
        return
    file = Path(platformdirs.user_state_path("tars", appauthor=False)) / "chat_history"
    with contextlib.suppress(OSError):  # none yet
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
        except OSError as error:
            click.echo(f"the history was not saved: {error}", err=True)
