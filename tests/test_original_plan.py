"""The calls the project began with, as they were asked for; only the imports are new."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tars_core import InferenceEngine
from tars_core.testing.processes import workers

CONFIG = {"use_llama_cpp": True, "use_ollama": True, "use_transformers": True, "device": "cpu"}


def test_initialisation_lists_the_backends() -> None:
    engine = InferenceEngine(config=CONFIG)
    backends = engine.list_available_backends()
    assert "xllamacpp" in backends
    assert engine.get_active_backend() == backends[0]
    engine.close()


def test_an_answer_is_not_empty() -> None:
    engine = InferenceEngine()
    answer = engine.generate("¿Cuál es tu nombre?", system_prompt="Eres una IA. Responde brevemente.", max_tokens=50)
    assert len(answer) > 0
    engine.close()


def test_three_calls_keep_working_as_backends_fail() -> None:
    engine = InferenceEngine(config=CONFIG)
    for number in range(3):
        assert engine.generate(f"Hola {number}", "Eres una IA. Responde brevemente.", max_tokens=20, temperature=0.7)
        assert engine.get_active_backend() is not None
        for worker in workers(os.getpid()):
            os.kill(worker, signal.SIGKILL)
    engine.close()


def test_the_benchmark_reports_seconds_for_what_works_and_none_for_what_failed() -> None:
    engine = InferenceEngine(config=CONFIG)
    results = engine.benchmark()
    assert results
    for backend, seconds in results.items():
        if seconds is None:
            assert backend not in engine.list_available_backends()
        else:
            assert 0 < seconds < 60
    assert results["xllamacpp"] is not None
    engine.close()


@pytest.mark.parametrize(
    "code",
    [
        "from tars_llamacpp import LlamaCppBackend; print(LlamaCppBackend)",
        "from tars_ollama import OllamaBackend; print(OllamaBackend)",
        "from tars_transformers import TransformersBackend; print(TransformersBackend)",
    ],
)
def test_each_backend_imports_alone_and_no_other_with_it(code: str) -> None:
    names = "{'tars_llamacpp', 'tars_xllamacpp', 'tars_ollama', 'tars_transformers', 'torch', 'llama_cpp', 'xllamacpp'}"
    own = code.split()[1]
    program = (
        f"{code}; import sys; assert {names} & set(sys.modules) == {{{own!r}}}, sorted({names} & set(sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=60)
