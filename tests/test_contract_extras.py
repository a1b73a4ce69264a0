"""What a backend may ask for beyond the plain contract: the messages themselves, its settings when it is probed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pydantic

from tars_core import InferenceEngine, Message, ModelRef, ProbeReport
from tars_core.plugin import (
    BASIC_FEATURES,
    BackendEvent,
    CancelFlag,
    Finished,
    GenerateRequest,
    LoadedModel,
    LoadOptions,
    OfferedModel,
    ProbeLimits,
    ProgressCallback,
    TextDelta,
    Usage,
    hookimpl,
)


class _Settings(pydantic.BaseModel):
    place: str = "nowhere"


class _Parrot:
    """Says what it was asked, and where it was looked for."""

    def __init__(self, *, renders_chat: bool) -> None:
        self._renders_chat = renders_chat
        self.requests: list[GenerateRequest] = []
        self.settings: list[str] = []

    @hookimpl
    def tars_probe(self, model: ModelRef | None, limits: ProbeLimits, backend_settings: str) -> ProbeReport:
        del model, limits
        self.settings.append(backend_settings)
        return ProbeReport(available=True)

    @hookimpl
    def tars_models(self, backend_settings: str) -> Sequence[OfferedModel]:
        self.settings.append(backend_settings)
        return ()

    @hookimpl
    def tars_settings(self) -> type[pydantic.BaseModel]:
        return _Settings

    @hookimpl
    def tars_load(
        self, model: ModelRef, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag
    ) -> LoadedModel:
        del model, progress, cancel
        self.settings.append(options.backend_settings)
        return LoadedModel(
            device="cpu",
            context_length=512,
            features=BASIC_FEATURES | ({"renders_chat"} if self._renders_chat else set()),
        )

    @hookimpl
    def tars_generate(
        self, loaded: LoadedModel, request: GenerateRequest, cancel: CancelFlag
    ) -> Iterator[BackendEvent]:
        del loaded, cancel
        self.requests.append(request)
        yield TextDelta(text="polly")
        yield Finished(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))


def _engine(parrot: _Parrot, **settings: object) -> InferenceEngine:
    return InferenceEngine(settings, model="parrot:x", plugins="parrot", extra_plugins={"parrot": parrot})


CONVERSATION = [Message(role="system", content="Be brief."), Message(role="user", content="Hi")]


def test_a_backend_that_renders_chat_gets_the_messages_and_no_prompt() -> None:
    parrot = _Parrot(renders_chat=True)
    with _engine(parrot) as engine:
        engine.chat(CONVERSATION)
    (request,) = parrot.requests
    assert (request.messages, request.prompt, request.sampling.stop) == (tuple(CONVERSATION), "", ())


def test_a_raw_prompt_stays_raw_for_it() -> None:
    parrot = _Parrot(renders_chat=True)
    with _engine(parrot) as engine:
        engine.complete("Hi", raw=True)
    (request,) = parrot.requests
    assert (request.messages, request.prompt) == ((), "Hi")
    assert request.sampling.stop == ("User:", "Usuario:")


def test_any_other_backend_gets_a_prompt_and_no_messages() -> None:
    parrot = _Parrot(renders_chat=False)
    with _engine(parrot) as engine:
        engine.chat(CONVERSATION)
    (request,) = parrot.requests
    assert (request.messages, request.prompt) == ((), "Be brief.\n\nHi")


def test_a_backend_sees_its_own_settings_when_it_is_probed_as_when_it_loads() -> None:
    parrot = _Parrot(renders_chat=False)
    with _engine(parrot, backends={"parrot": {"place": "here"}}) as engine:
        engine.models()
        engine.generate("Hi")
        engine.backends()
    assert len(parrot.settings) >= 4
    assert set(parrot.settings) == {'{"place":"here"}'}
