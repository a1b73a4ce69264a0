"""One backend by itself, and loading before the first question."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from tars_core import BackendUnavailable, ConfigError, EngineClosed, InferenceEngine, LoadFailed, RequestError
from tars_core.standalone import Backend
from tars_core.testing.fake import BackendScript, Echo, Finish, Raise, Say

WriteScript = Callable[..., str]


class Alpha(Backend):
    name = "alpha"


def test_it_is_loaded_once_it_exists_and_no_longer_once_closed(write_script: WriteScript) -> None:
    with Alpha(write_script(alpha=BackendScript())) as backend:
        assert backend.loaded
        assert backend.generate("hi") == "hello"
    assert not backend.loaded
    with pytest.raises(EngineClosed):
        backend.generate("hi")
    backend.close()


def test_the_prompt_arrives_as_it_is_and_the_answer_loses_its_white_space(write_script: WriteScript) -> None:
    script = BackendScript(generate=(Say(" "), Echo(), Finish()), chat_template="never: {{ messages[0].content }}")
    with Alpha(model_path=write_script(alpha=script)) as backend:
        assert backend.generate("User says: hi", max_tokens=20, temperature=0) == "User says: hi"
        with pytest.raises(RequestError):
            backend.generate("  ")


def test_a_load_that_fails_is_raised_with_its_reason(write_script: WriteScript) -> None:
    with pytest.raises(LoadFailed, match="no such weights"):
        Alpha(write_script(alpha=BackendScript(load=(Raise("LoadFailed", "no such weights"),))))


def test_a_model_it_cannot_run_is_raised_with_the_reason(write_script: WriteScript) -> None:
    with pytest.raises(BackendUnavailable, match="too old"):
        Alpha(write_script(alpha=BackendScript(available=False, reason="too old")))


def test_settings_are_those_of_the_engine(write_script: WriteScript) -> None:
    with pytest.raises(ConfigError, match="thread"):
        Alpha(write_script(alpha=BackendScript()), thread=1)


def test_no_other_plugin_is_asked(write_script: WriteScript, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tars_xllamacpp.plugin", raising=False)
    with Alpha(write_script(alpha=BackendScript(), beta=BackendScript(preference=100))) as backend:
        assert backend.generate("hi") == "hello"
    assert "tars_xllamacpp.plugin" not in sys.modules


def test_an_engine_can_load_before_the_first_question(make_engine: Callable[..., InferenceEngine]) -> None:
    engine = make_engine(alpha=BackendScript(device="npu", concurrency=3))
    loaded = engine.load()
    assert (loaded.device, loaded.context_length, loaded.concurrency) == ("npu", 512, 3)
    assert engine.load().pid == loaded.pid
    assert engine.complete("hi").timings.load_s is None
