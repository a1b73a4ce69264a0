"""This backend alone, without the choice between several."""

from __future__ import annotations

from tars_core.standalone import Backend


class LlamaCppBackend(Backend):
    """One GGUF file, run by llama.cpp in a process of its own."""

    name = "llamacpp"
