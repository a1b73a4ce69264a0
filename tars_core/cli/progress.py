"""A bar on stderr while a model loads; nothing where nobody looks."""

from __future__ import annotations

import shutil
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

_WIDTH = 24


class LoadBar:
    """Drawn by :meth:`update`, on a thread of the engine's, until :meth:`wipe` or the end of the ``with`` statement."""

    def __init__(self, *, shown: bool) -> None:
        self._shown = shown and sys.stderr.isatty()
        self._awaited = False
        self._drawn = False
        self._lock = threading.Lock()

    def update(self, backend: str, fraction: float, note: str) -> None:
        """Draw it; full, it is wiped."""
        if not self._shown:
            return
        filled = round(_WIDTH * fraction)
        line = f"{backend} [{'#' * filled}{'.' * (_WIDTH - filled)}] {fraction:4.0%} {note}"
        with self._lock:
            if not self._awaited:
                return
            sys.stderr.write("\r\x1b[K" + ("" if fraction >= 1 else line[: shutil.get_terminal_size().columns - 1]))
            sys.stderr.flush()
            self._drawn = fraction < 1

    def __enter__(self) -> Self:
        self._awaited = True
        return self

    def __exit__(self, *_: object) -> None:
        self.wipe()

    def wipe(self) -> None:
        """Leave the line to the answer: what comes late is not drawn any more."""
        with self._lock:
            self._awaited = False
            if self._drawn:
                sys.stderr.write("\r\x1b[K")
                sys.stderr.flush()
                self._drawn = False
