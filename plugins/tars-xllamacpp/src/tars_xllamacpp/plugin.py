"""The hooks. The runtime is imported in the worker only."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from tars_core.plugin import (
    BASIC_FEATURES,
    CancelFlag,
    LoadedModel,
    LoadFailed,
    LoadOptions,
    ModelRef,
    ProbeLimits,
    ProbeReport,
    ProgressCallback,
    hookimpl,
    is_gguf,
    probe_gguf,
)

if TYPE_CHECKING:
    import pydantic

_OVERHEAD_BYTES = 100 * 2**20  # measured: 55 MB of runtime, and compute buffers
_PREFERENCE = 60  # prebuilt and fast; a build made for this machine (llama-cpp-python) is faster
FEATURES = BASIC_FEATURES | {"token_ids"}

_DEVIATIONS = (
    "characters made of several tokens have no token ids",
    "of a prompt beyond 1 MB that cannot fit, only a lower bound of its tokens is reported",
)


@hookimpl
def tars_probe(model: ModelRef | None, limits: ProbeLimits) -> ProbeReport | None:
    """Read the file's header; look for the runtime's metadata."""
    del limits  # a header takes milliseconds
    path = model.path if model is not None else None
    if model is not None and (path is None or not is_gguf(path)):
        return None
    try:
        importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return ProbeReport(
            available=False, reason="the package xllamacpp is not installed", hint="pip install xllamacpp"
        )
    if path is None:
        return ProbeReport(available=True, device="cpu", features=FEATURES, deviations=_DEVIATIONS)
    return probe_gguf(path, device="cpu", overhead_bytes=_OVERHEAD_BYTES, preference=_PREFERENCE, features=FEATURES)


@hookimpl
def tars_settings() -> type[pydantic.BaseModel]:
    """Take ``[backends.xllamacpp]``."""
    from tars_xllamacpp.settings import XLlamaCppSettings  # noqa: PLC0415 - a probe goes without pydantic

    return XLlamaCppSettings


@hookimpl
def tars_load(model: ModelRef, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag) -> LoadedModel:
    """Start the server engine on the model."""
    del cancel  # the native load cannot be stopped; the host ends this process instead
    from tars_xllamacpp.server import ServedModel  # noqa: PLC0415 - imports the runtime

    if model.path is None:
        raise LoadFailed(f"{model} is not a file")
    if options.task != "generate":
        raise LoadFailed(f"the backend xllamacpp does not support the task {options.task!r}")
    progress(0.0, f"loading {model.path.name}")
    return ServedModel.load(model.path, options)
