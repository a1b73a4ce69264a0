"""How much memory a model takes, and what fits."""

from __future__ import annotations

from tars_core.models.gguf import GGUFHeader
from tars_core.system import memory

DEFAULT_CONTEXT = 8192
"""Tokens of context where the user named none, unless the model was trained for fewer."""
SMALLEST_CONTEXT = 512
"""Tokens; with fewer a model is of no use."""

_SHARE = 0.8


def fitting_context(header: GGUFHeader, wanted: int, sequences: int) -> int:
    """Halve ``wanted`` until the cache for all ``sequences`` fits the free memory beside the weights."""
    free = memory.free_bytes()
    context = wanted
    while free is not None and context > SMALLEST_CONTEXT:
        if header.tensor_bytes + header.kv_bytes(context) * sequences <= free * _SHARE:
            break
        context //= 2
    return context
