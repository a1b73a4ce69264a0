"""TARS backend: llama.cpp built for this machine, all requests in one batched loop.

>>> from tars_llamacpp import LlamaCppBackend
>>> with LlamaCppBackend(model_path="model.gguf") as backend:
...     print(backend.generate("The capital of France is", max_tokens=8))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tars_llamacpp.backend import LlamaCppBackend

__all__ = ["LlamaCppBackend"]


def __getattr__(name: str) -> object:
    # The plugin is imported by every engine, and needs none of what the backend alone brings with it.
    if name == "LlamaCppBackend":
        from tars_llamacpp.backend import LlamaCppBackend  # noqa: PLC0415

        return LlamaCppBackend
    raise AttributeError(f"module 'tars_llamacpp' has no attribute {name!r}")
