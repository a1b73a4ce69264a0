"""The smallest TARS backend: it says what it was told (``tars run -m echo: hello``)."""

from __future__ import annotations

from collections.abc import Iterator

from tars_core.plugin import (
    BASIC_FEATURES,
    BackendEvent,
    CancelFlag,
    Finished,
    FinishReason,
    GenerateRequest,
    LoadedModel,
    ModelRef,
    ProbeReport,
    TextDelta,
    Usage,
    hookimpl,
)


@hookimpl
def tars_probe(model: ModelRef | None) -> ProbeReport | None:
    """Take models named ``echo:``."""
    if model is not None and model.scheme != "echo":
        return None
    return ProbeReport(available=True, device="cpu", features=BASIC_FEATURES)


@hookimpl
def tars_load() -> LoadedModel:
    """There is nothing to load."""
    return LoadedModel(device="cpu", context_length=4096)


@hookimpl
def tars_generate(request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
    """Say the prompt, a word at a time."""
    words = request.prompt.split(" ")
    said = words[: request.sampling.max_tokens]
    for number, word in enumerate(said):
        if cancel.is_set():
            break
        yield TextDelta(text=word if number == 0 else f" {word}")
    reason: FinishReason = "cancelled" if cancel.is_set() else "length" if len(said) < len(words) else "stop"
    yield Finished(finish_reason=reason, usage=Usage(prompt_tokens=len(words), completion_tokens=len(said)))
