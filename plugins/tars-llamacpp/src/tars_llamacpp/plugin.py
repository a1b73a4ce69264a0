"""The hooks. The runtime is imported in the worker only."""

from __future__ import annotations

import importlib.metadata
import re

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

_RUNTIME = "llama-cpp-python"
_OVERHEAD_BYTES = 100 * 2**20
_PREFERENCE = 70  # built for this machine: faster than prebuilt wheels
_CPU = "cpu"
FEATURES = BASIC_FEATURES | {"token_ids", "tokenize"}
_GPU_LIBRARY = re.compile(r"(?:lib)?ggml-(cuda|hip|metal|vulkan|sycl)\.(?:so|dylib|dll)")
"""A build for a GPU has one of these; the headers of all come with every build."""

_DEVIATIONS = ("of a prompt beyond 1 MB that cannot fit, only a lower bound of its tokens is reported",)


@hookimpl
def tars_probe(model: ModelRef | None, limits: ProbeLimits) -> ProbeReport | None:
    """Read the file's header; look at the runtime's metadata and the names of its files."""
    del limits  # a header takes milliseconds
    path = model.path if model is not None else None
    if model is not None and (path is None or not is_gguf(path)):
        return None
    try:
        device = _built_for(importlib.metadata.distribution(_RUNTIME))
    except importlib.metadata.PackageNotFoundError:
        return ProbeReport(
            available=False,
            reason=f"the package {_RUNTIME} is not installed",
            hint=f"pip install {_RUNTIME} (builds from source: needs a C++ compiler and 6 to 15 minutes)",
        )
    if path is None:
        return ProbeReport(available=True, device=device, features=FEATURES, deviations=_DEVIATIONS)
    return probe_gguf(path, device=device, overhead_bytes=_OVERHEAD_BYTES, preference=_PREFERENCE, features=FEATURES)


def _built_for(runtime: importlib.metadata.Distribution) -> str:
    found = (_GPU_LIBRARY.fullmatch(file.name) for file in runtime.files or ())
    return next((match[1] for match in found if match), _CPU)


@hookimpl
def tars_load(model: ModelRef, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag) -> LoadedModel:
    """Load the file and start the loop."""
    if model.path is None:
        raise LoadFailed(f"{model} is not a file")
    if options.task != "generate":
        raise LoadFailed(f"the backend llamacpp does not support the task {options.task!r}")
    try:
        from tars_llamacpp.model import load  # noqa: PLC0415 - imports the runtime
    except (ImportError, OSError, RuntimeError) as error:  # what it raises where a shared library is missing
        raise LoadFailed(
            f"cannot import llama_cpp: {error}",
            hint=f"rebuild it: pip install --force-reinstall --no-cache-dir {_RUNTIME}",
        ) from error
    return load(model.path, options, progress, cancel)


@hookimpl
def tars_unload(loaded: LoadedModel) -> None:
    """Free the model."""
    from tars_llamacpp.loop import LoopedModel  # noqa: PLC0415 - imports the runtime

    if isinstance(loaded, LoopedModel):
        loaded.close()
