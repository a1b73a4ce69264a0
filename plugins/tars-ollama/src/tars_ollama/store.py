"""The daemon's store on disk, where it is readable: there lies the model's own chat template, which its API hides."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from tars_core.plugin import GGUFHeader, LoadFailed, read_gguf_header
from tars_ollama.wire import Show

_PLAIN = ("", "{{ .Prompt }}")


def header(show: Show, *, local: bool) -> GGUFHeader | None:
    """Return the header of the model's GGUF file, or ``None`` where there is none to be read.

    A blob's name is the digest of its contents, so any store that has it will do; the path that the daemon names is
    looked at only where it is a ``local`` one.
    """
    if show.weights is None:
        return None
    path, digest = show.weights
    for candidate in _candidates(Path(path) if local else None, f"sha256-{digest}"):
        try:
            return read_gguf_header(candidate)
        except (LoadFailed, OSError):  # noqa: PERF203 - not a GGUF file, not there, or not readable
            continue
    return None


def renders_chat(show: Show, header: GGUFHeader | None) -> bool:
    """Say whether messages are left to Ollama: where it alone has the template, or has more to say than that."""
    if header is not None and header.chat_template is None:
        return show.template.strip() not in _PLAIN
    return header is None or bool(show.system or show.messages)


def _candidates(stated: Path | None, blob: str) -> Iterator[Path]:
    if stated is not None:
        yield stated
    own = os.environ.get("OLLAMA_MODELS")
    yield (Path(own) if own else Path("~/.ollama/models").expanduser()) / "blobs" / blob
