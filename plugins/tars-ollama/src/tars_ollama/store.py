"""The daemon's store on disk, where it is readable: there lies the model's own chat template, which its API hides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tars_core.plugin import LoadFailed
from tars_core.sources import gguf
from tars_ollama.wire import Show


def header(show: Show, *, local: bool) -> gguf.GGUFHeader | None:
    """Return the header of the model's GGUF file, or ``None`` where there is none to be read.

    A blob's name is the digest of its contents, so any store that has it will do; the path that the daemon names is
    looked at only where it is a ``local`` one.
    """
    if show.weights is None:
        return None
    path, digest = show.weights
    for candidate in _candidates(Path(path) if local else None, f"sha256-{digest}"):
        try:
            return gguf.read_header(candidate)
        except (LoadFailed, OSError):  # noqa: PERF203 - no GGUF, not there, or not for us to read
            continue
    return None


def _candidates(stated: Path | None, blob: str) -> Iterator[Path]:
    if stated is not None:
        yield stated
    own = os.environ.get("OLLAMA_MODELS")
    yield (Path(own) if own else Path("~/.ollama/models").expanduser()) / "blobs" / blob
