"""TARS: text generation on whatever local engine a machine has.

>>> from tars_core import InferenceEngine
>>> with InferenceEngine() as engine:
...     print(engine.generate("¿Cuál es tu nombre?"))

Names are resolved on first use, so that ``import tars_core`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tars_core._version import __version__

if TYPE_CHECKING:
    from tars_core.engine import InferenceEngine
    from tars_core.errors import (
        AllBackendsFailed,
        BackendError,
        BackendUnavailable,
        ConfigError,
        ContextLengthExceeded,
        ContractError,
        DeadlineExceeded,
        EngineClosed,
        GenerationFailed,
        LoadFailed,
        ModelNotFound,
        OutOfMemory,
        Overloaded,
        PluginError,
        RequestError,
        StreamInterrupted,
        TarsError,
        WorkerDied,
    )
    from tars_core.events import Finished, Started, StreamEvent, TextDelta
    from tars_core.schema import (
        Attempt,
        BackendStatus,
        Candidate,
        Completion,
        Decision,
        Message,
        ModelRef,
        ProbeReport,
        SamplingParams,
        Timings,
        Usage,
    )

__all__ = [
    "AllBackendsFailed",
    "Attempt",
    "BackendError",
    "BackendStatus",
    "BackendUnavailable",
    "Candidate",
    "Completion",
    "ConfigError",
    "ContextLengthExceeded",
    "ContractError",
    "DeadlineExceeded",
    "Decision",
    "EngineClosed",
    "Finished",
    "GenerationFailed",
    "InferenceEngine",
    "LoadFailed",
    "Message",
    "ModelNotFound",
    "ModelRef",
    "OutOfMemory",
    "Overloaded",
    "PluginError",
    "ProbeReport",
    "RequestError",
    "SamplingParams",
    "Started",
    "StreamEvent",
    "StreamInterrupted",
    "TarsError",
    "TextDelta",
    "Timings",
    "Usage",
    "WorkerDied",
    "__version__",
]

_HOMES = ("errors", "schema", "events", "engine")
"""Where the names live, the cheapest to import first."""


if not TYPE_CHECKING:  # a checker that saw it would accept any name

    def __getattr__(name: str) -> object:
        if name in __all__:
            for home in _HOMES:
                module = importlib.import_module(f"tars_core.{home}")
                if hasattr(module, name):
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module 'tars_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
