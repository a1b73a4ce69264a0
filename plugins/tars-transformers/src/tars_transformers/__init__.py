"""TARS backend: safetensors checkpoints through Hugging Face transformers and PyTorch.

>>> from tars_transformers import TransformersBackend
>>> with TransformersBackend(model_name="microsoft/phi-2", device="cuda") as backend:
...     print(backend.generate("The capital of France is", max_tokens=8))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tars_transformers.backend import TransformersBackend

__all__ = ["TransformersBackend"]


def __getattr__(name: str) -> object:
    # The plugin is imported by every engine, and needs none of what the backend alone brings with it.
    if name == "TransformersBackend":
        from tars_transformers.backend import TransformersBackend  # noqa: PLC0415

        return TransformersBackend
    raise AttributeError(f"module 'tars_transformers' has no attribute {name!r}")
