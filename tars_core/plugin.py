"""The one import a plugin author needs.

>>> from tars_core.plugin import Finished, LoadedModel, ProbeReport, TextDelta, Usage, hookimpl
"""

from typing import TYPE_CHECKING

from tars_core.hookspecs import (
    BASIC_FEATURES,
    BatchedModel,
    CancelFlag,
    LoadedModel,
    LoadOptions,
    ProgressCallback,
    hookimpl,
)
from tars_core.kit.answer import Answer, say
from tars_core.kit.batching import InterleavedModel
from tars_core.kit.memory import is_out_of_memory
from tars_core.kit.probing import probe_file
from tars_core.kit.reports import Report, Reports
from tars_core.kit.sampling import GREEDY_BELOW, PENALTY_WINDOW, Sampler
from tars_core.kit.seeds import engine_seed
from tars_core.kit.text import StopFilter, Utf8Assembler, least_tokens
from tars_core.models.fit import DEFAULT_CONTEXT, SMALLEST_CONTEXT, fitting_context
from tars_core.models.gguf import GGUFHeader, is_gguf
from tars_core.models.gguf import probe as probe_gguf
from tars_core.models.gguf import read_header as read_gguf_header
from tars_core.types.errors import (
    ContextLengthExceeded,
    GenerationFailed,
    LoadFailed,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    RequestError,
    TarsError,
)
from tars_core.types.events import BackendEvent, Progress, ReasoningDelta, TextDelta, ToolCallDelta
from tars_core.types.events import BackendFinished as Finished
from tars_core.types.messages import Image, Message, Text, ToolCall
from tars_core.types.models import ModelRef, OfferedModel
from tars_core.types.reports import ProbeLimits, ProbeReport
from tars_core.types.request import Constraint, EmbedRequest, GenerateRequest, Resume, SamplingParams, Task, Tool
from tars_core.types.results import Embeddings, FinishReason, Timings, TokenLogprob, Usage

if TYPE_CHECKING:
    from tars_core.kit.templates import ChatTemplate

__all__ = [
    "BASIC_FEATURES",
    "DEFAULT_CONTEXT",
    "GREEDY_BELOW",
    "PENALTY_WINDOW",
    "SMALLEST_CONTEXT",
    "Answer",
    "BackendEvent",
    "BatchedModel",
    "CancelFlag",
    "ChatTemplate",
    "Constraint",
    "ContextLengthExceeded",
    "EmbedRequest",
    "Embeddings",
    "FinishReason",
    "Finished",
    "GGUFHeader",
    "GenerateRequest",
    "GenerationFailed",
    "Image",
    "InterleavedModel",
    "LoadFailed",
    "LoadOptions",
    "LoadedModel",
    "Message",
    "ModelNotFound",
    "ModelRef",
    "OfferedModel",
    "OutOfMemory",
    "Overloaded",
    "ProbeLimits",
    "ProbeReport",
    "Progress",
    "ProgressCallback",
    "ReasoningDelta",
    "Report",
    "Reports",
    "RequestError",
    "Resume",
    "Sampler",
    "SamplingParams",
    "StopFilter",
    "TarsError",
    "Task",
    "Text",
    "TextDelta",
    "Timings",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "ToolCallDelta",
    "Usage",
    "Utf8Assembler",
    "engine_seed",
    "fitting_context",
    "hookimpl",
    "is_gguf",
    "is_out_of_memory",
    "least_tokens",
    "probe_file",
    "probe_gguf",
    "read_gguf_header",
    "say",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name == "ChatTemplate":  # jinja takes 40 ms to import, and most plugins go without
            from tars_core.kit.templates import ChatTemplate  # noqa: PLC0415

            return ChatTemplate
        raise AttributeError(f"module 'tars_core.plugin' has no attribute {name!r}")
