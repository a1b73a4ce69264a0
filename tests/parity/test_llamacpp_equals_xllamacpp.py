"""The two backends that run llama.cpp give the same greedy text: one prompt, one meaning."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tars_demo_model
from tars_core import InferenceEngine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GGUF = tars_demo_model.WEIGHTS / "tars-demo.gguf"
PUBLISHED = Path(__file__).parents[2] / "models" / "demo" / "published.toml"
QUESTIONS = [
    pair[0] for intent in tomllib.loads(PUBLISHED.read_text("utf-8")).values() for pair in (intent["es"], intent["en"])
]


pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(runtime) for runtime in ("llama_cpp", "xllamacpp")),
    reason="needs llama-cpp-python, which takes 6 to 15 minutes to build, and xllamacpp",
)


@pytest.fixture(scope="module")
def engines() -> Iterator[list[InferenceEngine]]:
    with (
        InferenceEngine(backend="llamacpp", model=GGUF, threads=1) as one,
        InferenceEngine(backend="xllamacpp", model=GGUF, threads=1) as other,
    ):
        yield [one, other]


@pytest.mark.parametrize("system_prompt", [None, "Eres una IA. Responde brevemente."])
@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_are_alike(engines: list[InferenceEngine], question: str, system_prompt: str | None) -> None:
    one, other = (engine.complete(question, system_prompt, temperature=0) for engine in engines)
    assert (one.text, one.finish_reason, one.usage) == (other.text, other.finish_reason, other.usage)
