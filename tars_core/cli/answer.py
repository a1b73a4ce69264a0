"""``tars run``: the answer on stdout as it grows, then one line about it on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from tars_core.cli import output
from tars_core.cli.plain import dump
from tars_core.types.errors import RequestError, StreamInterrupted
from tars_core.types.events import Finished, Started, TextDelta
from tars_core.types.results import Completion

if TYPE_CHECKING:
    from tars_core.cli.progress import LoadBar
    from tars_core.engine import InferenceEngine, Sampling

# A model's text must not steer the terminal: escape sequences can retitle it, or type.
_CONTROLS = {code: None for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}


def piped_prompt() -> str:
    """Return what is piped in. Raises ``RequestError`` at a terminal, and for bytes that are no UTF-8."""
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError("there is no prompt", hint='tars run "What is your name?", or pipe one in')
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt piped in is not UTF-8 (byte {error.start})") from None


def as_json(engine: InferenceEngine, prompt: str, system: str | None, sampling: Sampling) -> None:
    """Print the whole result as one JSON object; of an answer that broke off, what there was of it."""
    try:
        output.write(dump(engine.complete(prompt, system, **sampling)))
    except StreamInterrupted as error:
        output.write(dump({"error": error.message, "backend": error.backend, "partial_text": error.partial_text}))
        raise


def streamed(  # noqa: PLR0913 - the request's parts, and where it is shown
    engine: InferenceEngine, prompt: str, system: str | None, sampling: Sampling, bar: LoadBar, *, quiet: bool
) -> None:
    """Print the text as it comes, and how it came about."""
    ends_line = True
    try:
        for event in engine.stream(prompt, system, **sampling):
            match event:
                case Started(decision=decision) if decision.notice and not quiet:
                    click.secho(f"note: {decision.notice}", err=True, dim=True)
                case TextDelta(text=text):
                    bar.wipe()
                    ends_line = text.endswith("\n")  # before it is written: Ctrl-C may come in between
                    output.write(shown(text))
                case Finished(completion=completion) if not quiet:
                    _end_line(ends_line)
                    ends_line = True
                    click.secho(summary(completion), err=True, dim=True)
    finally:
        _end_line(ends_line)


def shown(text: str) -> str:
    """Return ``text`` as it may be shown: on a terminal without control characters."""
    return text.translate(_CONTROLS) if output.on_terminal() else text


def _end_line(ends_line: bool) -> None:  # noqa: FBT001 - the one thing it is told
    if not ends_line:
        output.write("\n")


def summary(completion: Completion) -> str:
    """Return one line: backend, model, device, time to first token, tokens/s, and what went less than well."""
    timings = completion.timings
    parts = [completion.backend, completion.decision.model, completion.device]
    if timings.ttft_s is not None:
        parts.append(f"first token {timings.ttft_s:.2f} s")
    if timings.decode_tokens_per_s is not None:
        parts.append(f"{timings.decode_tokens_per_s:.0f} tokens/s")
    if completion.finish_reason == "length":
        parts.append("truncated at max_tokens or the context's end")
    if completion.degraded:
        parts.append(f"other weights: {completion.model}")
    failed = [attempt.backend for attempt in completion.attempts if attempt.failure]
    if failed:
        parts.append(f"after {', '.join(failed)} failed")
    return " · ".join(parts)
