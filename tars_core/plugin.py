"""The one import a plugin author needs.

>>> from tars_core.plugin import Finished, LoadedModel, ProbeReport, TextDelta, Usage, hookimpl
"""

from tars_core.answer import Answer
from tars_core.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    LoadFailed,
    ModelNotFound,
    OutOfMemory,
    RequestError,
)
from tars_core.events import BackendEvent, Progress, TextDelta
from tars_core.events import BackendFinished as Finished
from tars_core.hookspecs import BatchedModel, CancelFlag, LoadedModel, ProgressCallback, hookimpl
from tars_core.reports import Report, Reports
from tars_core.schema import (
    FinishReason,
    GenerateRequest,
    LoadOptions,
    ModelRef,
    OfferedModel,
    ProbeLimits,
    ProbeReport,
    SamplingParams,
    Timings,
    Usage,
)
from tars_core.text import StopFilter, Utf8Assembler

__all__ = [
    "Answer",
    "BackendEvent",
    "BatchedModel",
    "CancelFlag",
    "ContextLengthExceeded",
    "FinishReason",
    "Finished",
    "GenerateRequest",
    "GenerationFailed",
    "LoadFailed",
    "LoadOptions",
    "LoadedModel",
    "ModelNotFound",
    "ModelRef",
    "OfferedModel",
    "OutOfMemory",
    "ProbeLimits",
    "ProbeReport",
    "Progress",
    "ProgressCallback",
    "Report",
    "Reports",
    "RequestError",
    "SamplingParams",
    "StopFilter",
    "TextDelta",
    "Timings",
    "Usage",
    "Utf8Assembler",
    "hookimpl",
]
