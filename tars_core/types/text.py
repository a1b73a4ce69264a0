"""Checks on text that comes from outside."""

from __future__ import annotations

from tars_core.types.errors import RequestError

MAX_TEXT = 2**26
"""Characters of one text; beyond every model's context, and within one frame to a worker."""


def check_text(what: str, text: object) -> str:
    """Return ``text`` as a plain ``str``: a subclass, such as NumPy's, cannot be sent to a worker.

    Raises ``RequestError`` unless it is a string that UTF-8 can express, of at most 64 Mi characters.
    """
    if not isinstance(text, str):
        raise RequestError(f"{what} must be text, not {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise RequestError(f"{what} has {len(text)} characters", hint=f"no model takes more than {MAX_TEXT}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{what} holds a lone surrogate (U+{ord(text[error.start]):04X}) at position {error.start}",
            hint="decode the text with errors='replace' before it comes here",
        ) from None
    return str.__str__(text)


def as_utf8(text: object) -> str:
    """Make what came from a file's name or a library fit to be sent."""
    return str(text).encode(errors="backslashreplace").decode()
