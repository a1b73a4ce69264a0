"""The demo model keeps its published promise, in the format the wheel derives from the master."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

import tars_demo_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tars_core import InferenceEngine
from tars_core.plugin import read_gguf_header

ROOT = Path(__file__).parents[3]
SYSTEM = "Eres una IA. Responde brevemente."
REFUSALS = ("No lo sé", "I do not know")


def _published() -> dict[str, dict[str, list[str]]]:
    return tomllib.loads((ROOT / "models" / "demo" / "published.toml").read_text("utf-8"))


QUESTIONS = [tuple(pair) for intent in _published().values() for pair in intent.values()]


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine(model="demo:", threads=1) as engine:
        yield engine


def _derivation() -> ModuleType:
    path = ROOT / "plugins" / "tars-demo-model" / "gguf_from_master.py"
    spec = importlib.util.spec_from_file_location("gguf_from_master", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gguf_from_master"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_the_list_has_at_least_forty_questions_in_each_language() -> None:
    assert all(set(intent) == {"es", "en"} for intent in _published().values())
    assert len(_published()) >= 40


@pytest.mark.parametrize("system", [None, SYSTEM])
def test_every_published_question_gets_its_published_answer(engine: InferenceEngine, system: str | None) -> None:
    wrong = {
        question: got
        for question, answer in QUESTIONS
        if (got := engine.generate(question, system, temperature=0)) != answer
    }
    assert wrong == {}


@pytest.mark.parametrize(
    "question", ["¿Quién ganó el mundial de 1986?", "What is 17 times 23?", "¿Cómo se hace una paella?"]
)
def test_what_it_was_not_made_for_it_says_it_does_not_know(engine: InferenceEngine, question: str) -> None:
    assert engine.generate(question, temperature=0).startswith(REFUSALS)


def test_a_conversation_is_answered_turn_by_turn(engine: InferenceEngine) -> None:
    turns = [{"role": "user", "content": "Hola"}]
    assert engine.chat(turns, temperature=0).text == "¡Hola! ¿En qué te ayudo?"
    turns += [
        {"role": "assistant", "content": "¡Hola! ¿En qué te ayudo?"},
        {"role": "user", "content": "¿Qué es TARS?"},
    ]
    assert engine.chat(turns, temperature=0).text.startswith("TARS ejecuta modelos")


def test_used_without_having_been_asked_for_it_says_what_it_is() -> None:
    with InferenceEngine() as engine:
        assert "demo model" in (engine.plan().notice or "")
    with InferenceEngine(model="demo:") as engine:
        assert engine.plan().notice is None


def test_both_formats_are_offered_as_the_same_weights() -> None:
    (offered,) = tars_demo_model.tars_models()
    assert [ref.path is not None and ref.path.exists() for ref in offered.refs] == [True, True]
    assert offered.weights_id


def test_the_gguf_is_what_the_master_gives_to_the_byte(tmp_path: Path) -> None:
    derived = tmp_path / "again.gguf"
    _derivation().write_gguf(tars_demo_model.WEIGHTS, derived)
    installed = tars_demo_model.WEIGHTS / "tars-demo.gguf"
    assert hashlib.sha256(derived.read_bytes()).digest() == hashlib.sha256(installed.read_bytes()).digest()


def test_each_format_is_at_most_six_megabytes() -> None:
    for name in ("tars-demo.gguf", "model.safetensors"):
        assert (tars_demo_model.WEIGHTS / name).stat().st_size <= 6 * 2**20


def test_the_gguf_states_its_template_and_context() -> None:
    header = read_gguf_header(tars_demo_model.WEIGHTS / "tars-demo.gguf")
    assert header.context_length == 512
    assert header.chat_template is not None
    assert not header.adds_bos


def test_the_readme_lists_the_published_questions() -> None:
    readme = (ROOT / "plugins" / "tars-demo-model" / "README.md").read_text("utf-8")
    assert [question for question, _ in QUESTIONS if f"- {question}\n" not in readme] == []


class Share(msgspec.Struct):
    """Percent of answers that were right to the letter, greedy and with the framework's repeat penalty."""

    greedy: float
    repeat_penalty: float


class Evaluation(msgspec.Struct):
    """The figures that are promised."""

    published: Share
    published_with_system_prompt: Share
    independent: Share
    independent_unknown: Share


class Training(msgspec.Struct):
    """Which file was measured."""

    sha256: str
    minutes: float


class Results(msgspec.Struct):
    """What evaluate.py wrote."""

    training: Training
    evaluation: Evaluation


def test_the_measured_aims_hold_and_were_measured_on_these_weights() -> None:
    results = msgspec.json.decode((ROOT / "models" / "demo" / "results.json").read_bytes(), type=Results)
    master = (tars_demo_model.WEIGHTS / "model.safetensors").read_bytes()
    assert results.training.sha256 == hashlib.sha256(master).hexdigest()
    assert results.training.minutes <= 30
    measured = results.evaluation
    assert measured.published.repeat_penalty == measured.published_with_system_prompt.repeat_penalty == 100
    assert measured.independent.greedy >= 85
    assert measured.independent_unknown.greedy >= 90
