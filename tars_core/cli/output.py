"""Where answers go: the real stdout, which nothing else in this process can write to."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from tars_core.types.errors import TarsError

_out: TextIO = sys.stdout


class ReaderGoneError(Exception):
    """The other end of the pipe was closed, as ``head`` does.

    Not a BrokenPipeError: click ends the process with exit code 1 on that.
    """


def ensure_stderr() -> None:
    """Open one where it is closed, as ``2>&-`` does: nobody wants to read it, and everything writes to it."""
    if sys.stderr is None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        sys.stderr = os.fdopen(2, "w")


def claim_stdout() -> None:
    """Keep stdout for :func:`write`; what a plugin or a native library prints lands on stderr."""
    global _out  # noqa: PLW0603 - a process has one stdout
    if sys.stdout is None:
        raise TarsError("stdout is closed", hint="send the output to a file, or to /dev/null")
    sys.stdout.flush()
    # errors="replace": a terminal that knows only ASCII gets ? instead of an exception.
    _out = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors="replace")
    os.dup2(2, 1)


def write(text: str) -> None:
    """Write to stdout and flush, so that a stream is seen as it grows."""
    try:
        _out.write(text)
        _out.flush()
    except BrokenPipeError:
        raise ReaderGoneError from None
    except OSError as error:
        raise TarsError(f"the output cannot be written: {error.strerror}", hint="is the disk full?") from None


def on_terminal() -> bool:
    """Say whether a person reads it."""
    return _out.isatty()


def colours() -> bool:
    """Say whether to use colours: on a terminal, unless ``NO_COLOR`` is set (no-color.org)."""
    return on_terminal() and not os.environ.get("NO_COLOR")


def drop() -> None:
    """Send what is still buffered nowhere: the reader is gone, and Python flushes once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), _out.fileno())
