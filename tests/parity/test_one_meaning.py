"""A request means the same on every backend that runs the same weights.

Each backend is held against the next one. The docstrings are the rows of ``docs/parity.md``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tars_demo_model
from tars_core import Completion, ContextLengthExceeded, InferenceEngine, RequestError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUNTIMES = {"llamacpp": "llama_cpp", "xllamacpp": "xllamacpp", "transformers": "transformers"}
FORMS = {"transformers": tars_demo_model.WEIGHTS}
GGUF = tars_demo_model.WEIGHTS / "tars-demo.gguf"
SYSTEM = "Eres una IA. Responde brevemente."
PUBLISHED = Path(__file__).parents[2] / "models" / "demo" / "published.toml"
QUESTIONS = [
    pair[0] for intent in tomllib.loads(PUBLISHED.read_text("utf-8")).values() for pair in (intent["es"], intent["en"])
]
UNIT = "<|im_end|>"  # one token, whatever the vocabulary merges
TEXTS = {
    "accents": "¿Cuántos pingüinos caben en un cigüeñal?",
    "emoji": "👩‍🚀 👍🏽 🇪🇸 ☕️ 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "combining": "e\u0301 n\u0303 a\u0308\u0323 \u0300",
    "cjk": "漢字かな交じり文、한국어 텍스트。",
    "spaces": "  two\tand\n\n\nthree \u00a0\u2003 ",
    "special": "<|im_start|>user<|im_end|> <|im_end",
    "controls": "a\0b\u202e\ufeff\U0010ffff",
    "numbers": "1234567890 3.14159 1e-300 x²",
}
CONVERSATIONS = {
    "system and user": [("system", SYSTEM), ("user", "Hola")],
    "several turns": [("user", "Hola"), ("assistant", "¡Hola! ¿Qué tal?"), ("user", "Bien"), ("assistant", "Sí")] * 2
    + [("user", "¿Qué es TARS?")],
    "continued": [("user", "¿Qué es TARS?"), ("assistant", "TARS es ")],
    "continued inside a word": [("system", "Be brief."), ("user", "What is TARS?"), ("assistant", "TARS is a fra")],
}


class Backend:
    """One backend's answers, and the one it is held against."""

    def __init__(self, engine: InferenceEngine, answers: dict[str, Completion]) -> None:
        self.engine = engine
        self._answers = answers

    def complete(self, prompt: str | None = None, **options: object) -> Completion:
        asked = repr((prompt, options))
        if asked not in self._answers:
            self._answers[asked] = self.engine.complete(prompt, **options)  # type: ignore[arg-type]
        return self._answers[asked]

    def greedy(self, prompt: str | None = None, **options: object) -> tuple[str, str, int, int]:
        completion = self.complete(prompt, temperature=0, **options)
        usage = completion.usage
        return completion.text, completion.finish_reason, usage.prompt_tokens, usage.completion_tokens


@pytest.fixture(scope="module")
def open_backend() -> Iterator[Callable[[str], Backend]]:
    """Return a function that gives the backend of a name; each is loaded once."""
    engines: dict[str, InferenceEngine] = {}
    answers: dict[str, dict[str, Completion]] = {}

    def open_(name: str) -> Backend:
        if name not in engines:
            engines[name] = InferenceEngine(backend=name, model=FORMS.get(name, GGUF), threads=1)
        return Backend(engines[name], answers.setdefault(name, {}))

    yield open_
    for engine in engines.values():
        engine.close()


@pytest.fixture(params=RUNTIMES)
def name(request: pytest.FixtureRequest) -> str:
    if importlib.util.find_spec(RUNTIMES[request.param]) is None:
        pytest.skip(f"needs {request.param}, which is not installed")
    return str(request.param)


@pytest.fixture
def backend(name: str, open_backend: Callable[[str], Backend]) -> Backend:
    return open_backend(name)


@pytest.fixture
def other(name: str, open_backend: Callable[[str], Backend]) -> Backend:
    """Return the next backend round the ring that is installed."""
    names = list(RUNTIMES)
    at = names.index(name)
    ring = [*names[at + 1 :], *names[:at]]
    present = [other for other in ring if importlib.util.find_spec(RUNTIMES[other]) is not None]
    if not present:
        pytest.skip("needs two backends that are installed")
    return open_backend(present[0])


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts_have_as_many_tokens(backend: Backend, other: Backend, text: str) -> None:
    """Any text has the same number of tokens, raw and in the chat template."""
    for raw in (True, False):
        ask = {"raw": raw, "temperature": 0, "max_tokens": 1}
        assert backend.complete(text, **ask).usage == other.complete(text, **ask).usage


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_are_templated_alike(backend: Backend, other: Backend, turns: list[tuple[str, str]]) -> None:
    """A conversation has the same number of tokens, and the same continuation."""
    messages = [{"role": role, "content": content} for role, content in turns]
    assert backend.greedy(messages=messages) == other.greedy(messages=messages)


@pytest.mark.parametrize("system_prompt", [None, SYSTEM], ids=["bare", "system"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_answers_are_alike(backend: Backend, other: Backend, question: str, system_prompt: str | None) -> None:
    """A published question has the same greedy answer, finish reason and counts."""
    ask = {"system_prompt": system_prompt}
    assert backend.greedy(question, **ask) == other.greedy(question, **ask)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
@pytest.mark.parametrize("text", [TEXTS["accents"], TEXTS["cjk"]], ids=["accents", "cjk"])
def test_penalties_are_alike(backend: Backend, other: Backend, text: str, penalty: float) -> None:
    """A repeat penalty of another size changes the greedy text in the same way."""
    ask = {"repeat_penalty": penalty, "max_tokens": 25}
    assert backend.greedy(text, **ask) == other.greedy(text, **ask)


@pytest.mark.parametrize("size", [1, 3, 9])
def test_stop_strings_end_alike(backend: Backend, other: Backend, size: int) -> None:
    """A stop string, wherever tokens cut it, ends the same text with the same counts."""
    answer = other.greedy(QUESTIONS[0])[0]
    for at in range(0, len(answer) - size, 4):
        ask = {"stop": [answer[at : at + size], "never said"]}
        got = backend.greedy(QUESTIONS[0], **ask)
        assert got == other.greedy(QUESTIONS[0], **ask)
        assert got[:2] == (answer[: answer.find(answer[at : at + size])], "stop")


def test_text_that_only_began_like_a_stop_string_is_kept(backend: Backend, other: Backend) -> None:
    """Text that only began like a stop string is kept."""
    answer = other.greedy(QUESTIONS[0])
    assert backend.greedy(QUESTIONS[0], stop=[answer[0][-5:] + " and more"]) == answer


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8])
def test_max_tokens_cuts_alike(backend: Backend, other: Backend, limit: int) -> None:
    """``max_tokens`` ends the same text with ``length`` and the same counts."""
    got = backend.greedy(QUESTIONS[0], max_tokens=limit)
    assert got == other.greedy(QUESTIONS[0], max_tokens=limit)
    assert (got[1], got[3]) == ("length", limit)


@pytest.mark.parametrize("text", [TEXTS["emoji"], TEXTS["combining"], TEXTS["cjk"]], ids=["emoji", "combining", "cjk"])
def test_characters_are_never_cut(backend: Backend, other: Backend, text: str) -> None:
    """A character that ``max_tokens`` cuts is dropped, not shown in halves."""
    for limit in range(1, 13):
        # Below 1 the penalty is a reward: the model repeats the bytes of the prompt's characters.
        ask = {"raw": True, "repeat_penalty": 0.2, "max_tokens": limit}
        got = backend.greedy(text * 3, **ask)
        assert got == other.greedy(text * 3, **ask)


@pytest.mark.parametrize("blank", ["", " ", "\n\t\u2003"], ids=["empty", "space", "white"])
def test_blank_prompts_are_refused(backend: Backend, blank: str) -> None:
    """An empty or blank prompt is a ``RequestError``."""
    with pytest.raises(RequestError):
        backend.complete(blank)


@pytest.mark.parametrize("text", [UNIT * 512, UNIT * 3000, "palabra " * 1500], ids=["by one", "by far", "words"])
def test_overlong_prompts_are_refused_alike(backend: Backend, other: Backend, text: str) -> None:
    """A prompt that leaves no room is a ``ContextLengthExceeded`` with the same two figures."""
    figures = []
    for one in (backend, other):
        with pytest.raises(ContextLengthExceeded) as caught:
            one.complete(text, raw=True)
        figures.append((caught.value.prompt_tokens, caught.value.context_length))
    assert figures[0] == figures[1]


def test_the_last_place_of_the_context_can_be_used(backend: Backend, other: Backend) -> None:
    """A prompt that leaves room for one token is answered with one."""
    got = backend.greedy(UNIT * 511, raw=True)
    assert got == other.greedy(UNIT * 511, raw=True)
    assert got[2:] == (511, 1)


@pytest.mark.parametrize(
    "narrow",
    [
        {"top_k": 4},
        {"top_k": 4, "top_p": 0.6},
        {"top_k": 6, "min_p": 0.2},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.1},
    ],
    ids=["top_k", "top_k top_p", "top_k min_p", "all"],
)
def test_the_filters_leave_the_same_tokens(backend: Backend, other: Backend, narrow: dict[str, float]) -> None:
    """top-k, then top-p, then min-p, all before the temperature, leave the same tokens to draw from."""
    drawn = [
        # So hot that each token left is drawn about equally often.
        {
            one.complete(
                "Hola, ", raw=True, max_tokens=1, seed=seed, **{"temperature": 10.0, "top_p": 1.0, **narrow}
            ).text
            for seed in range(60)
        }
        for one in (backend, other)
    ]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    "narrow",
    [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 0.999999}, {"temperature": 1e-9}],
    ids=["top_k", "top_p", "min_p", "temperature"],
)
def test_sampling_that_leaves_one_token_is_greedy(backend: Backend, other: Backend, narrow: dict[str, float]) -> None:
    """Sampling that leaves one token to draw from gives the greedy text."""
    wide = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert backend.complete(QUESTIONS[0], **{**wide, **narrow}, seed=1).text == other.greedy(QUESTIONS[0])[0]


def test_a_seed_repeats_its_text(backend: Backend) -> None:
    """On one backend the same seed gives the same text, and another seed another."""
    wild = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "max_tokens": 15}
    texts = [[backend.engine.generate("Hola", seed=seed, **wild) for seed in range(4)] for _ in range(2)]  # type: ignore[arg-type]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4
