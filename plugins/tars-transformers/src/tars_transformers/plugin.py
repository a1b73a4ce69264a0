"""The hooks. The runtime is imported in the worker only."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

from tars_core.plugin import (
    BASIC_FEATURES,
    BackendEvent,
    CancelFlag,
    GenerateRequest,
    LoadedModel,
    LoadFailed,
    LoadOptions,
    ModelRef,
    ProbeLimits,
    ProbeReport,
    ProgressCallback,
    hookimpl,
)
from tars_transformers import checkpoint, hub

_RUNTIME = ("torch", "transformers")
_OVERHEAD_BYTES = 400 * 2**20  # measured: 365 MB resident with a build for the CPU and a tiny model
_PREFERENCE = 40  # llama.cpp is faster with the same weights
_CPU = "cpu"
FEATURES = BASIC_FEATURES | {"token_ids", "tokenize"}
_NVIDIA = Path("/proc/driver/nvidia/version")

_DEVIATIONS = (
    "answers one request at a time; the others wait",
    "context_length never goes beyond what the model was trained for",
    "of a prompt beyond 1 MB that cannot fit, only a lower bound of its tokens is reported",
)


@hookimpl
def tars_probe(model: ModelRef | None, limits: ProbeLimits) -> ProbeReport | None:
    """Read the configuration and the headers of the weights; look for the runtime's metadata."""
    del limits  # headers take milliseconds
    name = hub.repository(model) if model is not None else None
    folder = hub.cached(name) if name is not None else model.path if model is not None else None
    if model is not None and name is None and (folder is None or not (folder / checkpoint.CONFIG).is_file()):
        return None
    try:
        torch, _ = map(importlib.metadata.version, _RUNTIME)
    except importlib.metadata.PackageNotFoundError as error:
        return ProbeReport(
            available=False,
            reason=f"the package {error.name} is not installed",
            hint=f"pip install {' '.join(_RUNTIME)} (torch: 0.2 GB of download for the CPU alone, some GB with CUDA)",
        )
    device = _device(torch)
    if folder is None:
        # Whether a model may be fetched is known when it is loaded.
        return ProbeReport(
            available=True, device=device, features=FEATURES, preference=_PREFERENCE, deviations=_DEVIATIONS
        )
    try:
        facts = checkpoint.inspect(folder)
    except LoadFailed as error:
        return ProbeReport(available=False, reason=error.message, hint=error.hint)
    return ProbeReport(
        available=True,
        device=device,
        # Of the machine's memory; a GPU has its own, which only the runtime can ask for.
        memory_bytes=facts.tensor_bytes + _OVERHEAD_BYTES if device == _CPU else None,
        weights_id=facts.weights_id,
        context_length=facts.context_length,
        features=FEATURES,
        preference=_PREFERENCE,
    )


def _device(torch: str) -> str:
    """Guess from the version: a build for the CPU alone says so (2.13.0+cpu)."""
    if sys.platform == "darwin":
        return "mps"
    return "cuda" if _NVIDIA.exists() and not torch.endswith("+cpu") else _CPU


@hookimpl
def tars_load(model: ModelRef, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag) -> LoadedModel:
    """Find the folder, fetch it where that is allowed, and load it."""
    if options.task != "generate":
        raise LoadFailed(f"the backend transformers does not support the task {options.task!r}")
    folder = _folder(model, options, progress, cancel)
    facts = checkpoint.inspect(folder)  # before anything is imported: a damaged file is refused at once
    try:
        for at, name in enumerate(_RUNTIME):
            progress(0.1 + at / 10, f"importing {name}")
            importlib.import_module(name)
        from tars_transformers.model import load  # noqa: PLC0415 - imports the runtime
    except (ImportError, OSError, RuntimeError) as error:  # what it raises where a shared library is missing
        raise LoadFailed(f"cannot import torch or transformers: {error}", hint="reinstall them") from error
    return load(folder, facts, options, progress, cancel)


def _folder(model: ModelRef, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag) -> Path:
    name = hub.repository(model)
    folder = hub.cached(name) if name is not None else model.path
    if folder is not None:
        return folder
    if name is None:
        raise LoadFailed(f"{model} is not a folder")
    if not options.allow_download:
        raise hub.missing(name)
    return hub.download(name, progress, cancel)


@hookimpl
def tars_generate(loaded: LoadedModel, request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
    """Run the decode loop."""
    from tars_transformers.generate import TransformersModel  # noqa: PLC0415 - imports the runtime

    if not isinstance(loaded, TransformersModel):
        raise LoadFailed(f"{type(loaded).__name__} is not a model of this backend")
    return loaded.generate(request, cancel)


@hookimpl
def tars_unload(loaded: LoadedModel) -> None:
    """Free the model."""
    from tars_transformers.generate import TransformersModel  # noqa: PLC0415 - imports the runtime

    if isinstance(loaded, TransformersModel):
        loaded.close()
