"""TARS: text generation on whatever local engine a machine has.

>>> from tars_core import InferenceEngine
>>> with InferenceEngine() as engine:
...     print(engine.generate("¿Cuál es tu nombre?"))

Names are resolved on first use, so that ``import tars_core`` costs next to nothing.
"""

from __future__ import annotations

from tars_core._version import __version__

TYPE_CHECKING = False  # what type checkers take for true; importing typing would take a tenth of `tars --version`
if TYPE_CHECKING:
    from tars_core.engine import InferenceEngine
    from tars_core.runtime.streams import AsyncStream, Stream
    from tars_core.types.errors import (
        BackendError,
        BackendUnavailable,
        ConfigError,
        ContextLengthExceeded,
        ContextShrunk,
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
    from tars_core.types.events import (
        Finished,
        ReasoningDelta,
        Started,
        StreamEvent,
        TextDelta,
        ToolCallDelta,
    )
    from tars_core.types.failures import AllBackendsFailed, Attempt, Failure
    from tars_core.types.messages import Image, Message, Text, ToolCall
    from tars_core.types.models import ModelRef, OfferedModel
    from tars_core.types.reports import BackendStatus, LoadedStatus, ProbeReport
    from tars_core.types.request import SamplingParams
    from tars_core.types.results import (
        Candidate,
        Completion,
        Decision,
        Embeddings,
        Rejection,
        Timings,
        TokenLogprob,
        Usage,
    )

__all__ = [
    "AllBackendsFailed",
    "AsyncStream",
    "Attempt",
    "BackendError",
    "BackendStatus",
    "BackendUnavailable",
    "Candidate",
    "Completion",
    "ConfigError",
    "ContextLengthExceeded",
    "ContextShrunk",
    "ContractError",
    "DeadlineExceeded",
    "Decision",
    "Embeddings",
    "EngineClosed",
    "Failure",
    "Finished",
    "GenerationFailed",
    "Image",
    "InferenceEngine",
    "LoadFailed",
    "LoadedStatus",
    "Message",
    "ModelNotFound",
    "ModelRef",
    "OfferedModel",
    "OutOfMemory",
    "Overloaded",
    "PluginError",
    "ProbeReport",
    "ReasoningDelta",
    "Rejection",
    "RequestError",
    "SamplingParams",
    "Started",
    "Stream",
    "StreamEvent",
    "StreamInterrupted",
    "TarsError",
    "Text",
    "TextDelta",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "Usage",
    "WorkerDied",
    "__version__",
]

_HOMES = (
    "types.errors",
    "types.failures",
    "types.messages",
    "types.models",
    "types.reports",
    "types.request",
    "types.results",
    "types.events",
    "runtime.streams",
    "engine",
)
"""Where the names live, the cheapest to import first."""


if not TYPE_CHECKING:  # a checker that saw it would accept any name

    def __getattr__(name: str) -> object:
        import importlib  # noqa: PLC0415 - who needs no name needs none of it

        if name in __all__:
            for home in _HOMES:
                module = importlib.import_module(f"tars_core.{home}")
                if hasattr(module, name):
                    value = globals()[name] = getattr(module, name)
                    return value
        raise AttributeError(f"module 'tars_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
