"""TARS backend: the models of an Ollama daemon.

>>> from tars_ollama import OllamaBackend
>>> with OllamaBackend(model="llama3") as backend:
...     print(backend.generate("The capital of France is", max_tokens=8))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tars_ollama.backend import OllamaBackend

__all__ = ["OllamaBackend"]


def __getattr__(name: str) -> object:
    # The plugin is imported by every engine, and needs none of what the backend alone brings with it.
    if name == "OllamaBackend":
        from tars_ollama.backend import OllamaBackend  # noqa: PLC0415

        return OllamaBackend
    raise AttributeError(f"module 'tars_ollama' has no attribute {name!r}")
