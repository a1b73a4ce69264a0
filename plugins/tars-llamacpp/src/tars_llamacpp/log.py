"""What llama.cpp says: kept instead of printed. Its functions return no more than NULL or a code."""

from __future__ import annotations

import collections
import ctypes

import llama_cpp

_KEPT_LINES = 200
_ERROR = 4  # ggml_log_level
_CONTINUED = 5

_lines: collections.deque[tuple[int, str]] = collections.deque(maxlen=_KEPT_LINES)


def _keep(level: int, text: bytes, _user_data: object) -> None:
    words = text.decode(errors="replace")
    if level == _CONTINUED and _lines:
        level, begun = _lines.pop()
        words = begun + words
    _lines.append((level, words))


_callback = llama_cpp.llama_log_callback(_keep)  # native code has its address: it must live as long


def listen() -> None:
    """Keep the log from here on. Process-wide, as llama.cpp's log is."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))
    _lines.clear()


def lines() -> list[str]:
    """Return what was said last."""
    return [words.strip() for _, words in _lines]


def errors() -> list[str]:
    """Return the errors among it, without the names of the functions that wrote them."""
    return [words.strip().partition(": ")[2] or words.strip() for level, words in _lines if level == _ERROR]
