"""One meaning of a seed on every backend."""

from __future__ import annotations

_RESERVED = 2**32 - 1


def engine_seed(seed: int | None) -> int:
    """Return what an engine is to be given for ``seed``, 0 to 2³²-1.

    llama.cpp takes 2³²-1 for "draw one" (``LLAMA_DEFAULT_SEED``), so nobody is given that: it means 0, everywhere. The
    core has drawn a seed before a backend sees the request; ``None`` is 0.
    """
    return (seed or 0) % _RESERVED
