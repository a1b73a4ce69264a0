"""How engines say that memory is not enough."""

from __future__ import annotations

import re

_WORDS = re.compile(
    r"out of memory|(failed|unable) to allocate|can't allocate memory|not enough memory|insufficient memory|bad_alloc"
    r"|more system memory|cudamalloc failed|signal: killed",
    re.IGNORECASE,
)


def is_out_of_memory(text: str) -> bool:
    """Say whether an engine's message, of llama.cpp, PyTorch, CUDA or Ollama, means that memory is not enough."""
    return bool(_WORDS.search(text))
