"""The hooks. What runs the requests is imported in the worker only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from tars_core.plugin import (
    CancelFlag,
    LoadedModel,
    LoadFailed,
    LoadOptions,
    ModelNotFound,
    ModelRef,
    OfferedModel,
    ProbeLimits,
    ProbeReport,
    ProgressCallback,
    hookimpl,
)
from tars_ollama.address import Address

if TYPE_CHECKING:
    import pydantic

_SCHEME = "ollama"
_LIST_S = 0.4
_SHARE = 0.8
"""Of a probe's deadline: a report that is late is rejected."""


class _Where(msgspec.Struct):
    host: str | None = None


def _address(backend_settings: str) -> Address:
    return Address.find(msgspec.json.decode(backend_settings, type=_Where).host)


@hookimpl
def tars_probe(model: ModelRef | None, limits: ProbeLimits, backend_settings: str) -> ProbeReport | None:
    """Ask the daemon whether it is there, and what it knows of the model."""
    if model is not None and model.scheme != _SCHEME:
        return None
    from tars_ollama.probe import daemon, named  # noqa: PLC0415 - only where there is a question

    address = _address(backend_settings)
    deadline_s = limits.deadline_s * _SHARE
    return daemon(address, deadline_s) if model is None else named(model.rest, address, deadline_s)


@hookimpl
def tars_models(backend_settings: str) -> Sequence[OfferedModel]:
    """Name what the daemon has; nothing where it is off."""
    from tars_ollama.probe import offered  # noqa: PLC0415

    names = offered(_address(backend_settings), _LIST_S)
    refs = [ModelRef(scheme=_SCHEME, rest=name) for name in names]
    return tuple(OfferedModel(name=ref, refs=(ref,)) for ref in refs)


@hookimpl
def tars_settings() -> type[pydantic.BaseModel]:
    """Take ``[backends.ollama]``."""
    from tars_ollama.settings import OllamaSettings  # noqa: PLC0415 - a probe goes without pydantic

    return OllamaSettings


@hookimpl
def tars_load(model: ModelRef, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag) -> LoadedModel:
    """Have the daemon load the model."""
    from tars_ollama.model import load  # noqa: PLC0415 - imports httpx
    from tars_ollama.settings import OllamaSettings  # noqa: PLC0415

    if model.scheme != _SCHEME:
        raise ModelNotFound(f"{model} is not an Ollama model", hint="name it ollama:NAME")
    if options.task != "generate":
        raise LoadFailed(f"the backend ollama does not support the task {options.task!r}")
    settings = OllamaSettings.model_validate_json(options.backend_settings)
    return load(model.rest, Address.find(settings.host), options, settings, progress, cancel)


@hookimpl
def tars_unload(loaded: LoadedModel) -> None:
    """Close the connections."""
    from tars_ollama.model import OllamaModel  # noqa: PLC0415

    if isinstance(loaded, OllamaModel):
        loaded.close()
