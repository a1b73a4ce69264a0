"""Text as it grows: UTF-8 that arrives in pieces, and stop strings across their borders."""

from __future__ import annotations

import codecs


class Utf8Assembler:
    """Turns bytes, cut anywhere, into text made of whole code points.

    U+FFFD stands only for bytes that really are no UTF-8; a character still unfinished at the end is dropped,
    since the model never finished it.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """Return the text that ``data`` completes."""
        return self._decoder.decode(data)


_LONG_BYTES = 2**20


def least_tokens(text: str, longest_token: int) -> int:
    """Return how many tokens a text beyond 1 MiB has at the least; 0 for a shorter one, where counting is quick.

    ``longest_token`` is the most bytes that one token of the vocabulary stands for. Tokenising 32 MiB takes llama.cpp
    8 s and 1.2 GB.
    """
    if len(text) <= _LONG_BYTES // 4:  # a character has at most four bytes
        return 0
    size = len(text.encode())
    return size // max(1, longest_token) if size > _LONG_BYTES else 0


class StopFilter:
    """Ends a text before the first of several stop strings.

    Text that could be the beginning of a stop string is held back until the next piece decides it.

    >>> stop = StopFilter(("User:",))
    >>> stop.push("hello Us"), stop.push("er: x"), stop.stopped
    ('hello ', '', True)
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped: bool = False

    def push(self, text: str) -> str:
        """Add ``text``; return what can be shown now. Nothing comes after :attr:`stopped`."""
        if self.stopped:
            return ""
        held = self._held + text
        # The first to be complete ends the text, not the first to begin: else the result hung on where pieces end.
        hits = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        if hits:
            self.stopped = True
            self._held = ""
            return held[: min(hits)[1]]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``, shorter than ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
