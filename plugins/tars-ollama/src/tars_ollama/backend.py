"""This backend alone, without the choice between several."""

from __future__ import annotations

from tars_core.standalone import Backend

_SCHEME = "ollama:"


class OllamaBackend(Backend):
    """One model of an Ollama daemon, by the name that ``ollama list`` shows."""

    name = "ollama"

    def __init__(self, model: str, **settings: object) -> None:
        super().__init__(_SCHEME + model.removeprefix(_SCHEME), **settings)
