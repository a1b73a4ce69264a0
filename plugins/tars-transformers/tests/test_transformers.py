"""The backend in a worker, with the demo model: what its users rely on."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import tars_demo_model
from tars_core import ContextLengthExceeded, InferenceEngine, StreamEvent, TextDelta
from tars_transformers import TransformersBackend

WEIGHTS = tars_demo_model.WEIGHTS
QUESTION = "¿Qué es TARS?"
UNIT = "<|im_end|>"  # one token, whatever the vocabulary merges


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine(backend="transformers", model=WEIGHTS, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def answer(engine: InferenceEngine) -> str:
    """Return a greedy answer; what it says is the demo model's business."""
    return engine.complete(QUESTION, temperature=0).text


def _long_answer(engine: InferenceEngine) -> Iterator[StreamEvent]:
    return engine.stream("xyzzy", raw=True, temperature=10, top_k=0, top_p=1, max_tokens=450, seed=3)


class TestAnAnswer:
    def test_is_streamed_with_its_tokens_and_ends_with_an_end_token_that_is_counted(
        self, engine: InferenceEngine, answer: str
    ) -> None:
        events = list(engine.stream(QUESTION, temperature=0))
        deltas = [e for e in events if isinstance(e, TextDelta)]
        completion = engine.complete(QUESTION, temperature=0)
        assert "".join(e.text for e in deltas) == completion.text == answer
        assert len(deltas) > 5
        assert (completion.finish_reason, completion.device) == ("stop", "cpu")
        assert completion.usage.completion_tokens == sum(len(e.token_ids) for e in deltas) + 1

    def test_knows_its_speed(self, engine: InferenceEngine) -> None:
        speed = engine.complete(QUESTION, temperature=0).timings.decode_tokens_per_s
        assert speed is not None
        assert speed > 5

    def test_of_one_token_has_no_speed(self, engine: InferenceEngine) -> None:
        assert engine.complete(QUESTION, max_tokens=1).timings.decode_tokens_per_s is None

    @pytest.mark.parametrize("size", [1, 4, 11])
    def test_ends_before_a_stop_string_however_tokens_cut_it(
        self, engine: InferenceEngine, answer: str, size: int
    ) -> None:
        for at in range(0, len(answer) - size, 9):
            stop = answer[at : at + size]
            completion = engine.complete(QUESTION, temperature=0, stop=[stop, "never said"])
            assert (completion.text, completion.finish_reason) == (answer[: answer.find(stop)], "stop")

    def test_keeps_the_text_that_only_began_like_a_stop_string(self, engine: InferenceEngine, answer: str) -> None:
        assert engine.complete(QUESTION, temperature=0, stop=[answer[-6:] + " and more"]).text == answer

    def test_counts_the_tokens_of_a_stop_string(self, engine: InferenceEngine, answer: str) -> None:
        whole = engine.complete(QUESTION, temperature=0).usage
        stopped = engine.complete(QUESTION, temperature=0, stop=[answer[:1]])
        assert (stopped.text, stopped.usage.completion_tokens) == ("", 1)
        assert stopped.usage.prompt_tokens == whole.prompt_tokens

    def test_is_cut_by_max_tokens_between_whole_characters(self, engine: InferenceEngine, answer: str) -> None:
        for limit in range(1, 9):
            completion = engine.complete(QUESTION, temperature=0, max_tokens=limit)
            assert (completion.finish_reason, completion.usage.completion_tokens) == ("length", limit)
            assert answer.startswith(completion.text)


class TestSampling:
    def test_repeats_with_the_seed_and_differs_without(self, engine: InferenceEngine) -> None:
        def sample(seed: int) -> str:
            return engine.generate("Hola", temperature=5, top_k=0, top_p=1, max_tokens=15, seed=seed)

        assert [sample(seed) for seed in (1, 2**32 - 1)] == [sample(seed) for seed in (1, 2**32 - 1)]
        assert len({sample(seed) for seed in range(4)}) == 4

    def test_takes_the_highest_seed_for_0_as_every_backend_does(self, engine: InferenceEngine) -> None:
        highest, lowest = (
            engine.generate("Hola", temperature=5, top_k=0, top_p=1, max_tokens=15, seed=seed)
            for seed in (2**32 - 1, 0)
        )
        assert highest == lowest

    @pytest.mark.parametrize(
        "narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 0.999999}, {"temperature": 1e-9}, {"temperature": 1e-300}]
    )
    def test_that_leaves_one_token_is_greedy(
        self, engine: InferenceEngine, answer: str, narrow: dict[str, float]
    ) -> None:
        wide = {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        assert engine.complete(QUESTION, **{**wide, **narrow}, seed=1).text == answer  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "extreme",
        [{"repeat_penalty": 1e-300}, {"top_k": 2**31 - 1}, {"min_p": 1 - 1e-12}, {"temperature": 1e-5, "top_k": 0}],
    )
    def test_at_the_edge_of_the_ranges_still_answers(self, engine: InferenceEngine, extreme: dict[str, float]) -> None:
        completion = engine.complete("Hola", max_tokens=5, seed=1, **extreme)  # type: ignore[arg-type]
        assert completion.usage.completion_tokens >= 1


class TestThePrompt:
    def test_may_fill_the_context_but_for_one_token(self, engine: InferenceEngine) -> None:
        completion = engine.complete(UNIT * 511, raw=True, temperature=0)
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (511, 1)

    def test_that_leaves_no_token_is_refused_with_both_numbers(self, engine: InferenceEngine) -> None:
        with pytest.raises(ContextLengthExceeded) as caught:
            engine.complete(UNIT * 512, raw=True)
        assert (caught.value.prompt_tokens, caught.value.context_length) == (512, 512)

    def test_can_be_ten_megabytes_of_nothing(self, engine: InferenceEngine) -> None:
        with pytest.raises(ContextLengthExceeded):
            engine.complete("a" * 10_000_000, raw=True)

    @pytest.mark.parametrize("text", ["Hola", "¿Qué? 👩‍🚀", "<|im_start|>user\nHola<|im_end|>\n", "a\0b" * 99])
    def test_is_tokenised_alone_as_it_is_for_an_answer(self, engine: InferenceEngine, text: str) -> None:
        for raw in (True, False):
            usage = engine.complete(text, raw=raw, max_tokens=1).usage
            assert len(engine.tokenize(text, raw=raw)) == usage.prompt_tokens

    @pytest.mark.parametrize(
        "text", ["a\0b", "\U0010ffff\ufeff\u202e\u0300", "<|im_start|>" * 9, "\N{OGHAM SPACE MARK}."]
    )
    def test_can_hold_every_character(self, engine: InferenceEngine, text: str) -> None:
        assert engine.complete(text, raw=True, max_tokens=3).usage.prompt_tokens > 0


def test_eight_at_once_get_the_answers_they_would_get_alone(engine: InferenceEngine) -> None:
    questions = ("¿Cuál es tu nombre?", "What is TARS?", "Hola", "Thank you")
    alone = [engine.generate(q, temperature=0) for q in questions] * 2
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda q: engine.generate(q, temperature=0), questions * 2)) == alone


class TestACancel:
    def test_while_it_answers_frees_the_place(self, engine: InferenceEngine) -> None:
        for _ in range(3):
            for event in _long_answer(engine):
                if isinstance(event, TextDelta):
                    break
        self._still_loaded(engine)

    def test_while_it_reads_the_prompt_frees_the_place(self, engine: InferenceEngine) -> None:
        for _ in range(3):
            with pytest.raises(asyncio.TimeoutError):
                asyncio.run(self._give_up_soon(engine))
        self._still_loaded(engine)

    async def _give_up_soon(self, engine: InferenceEngine) -> None:
        await asyncio.wait_for(engine.acomplete(UNIT * 511, raw=True), timeout=0.01)

    def _still_loaded(self, engine: InferenceEngine) -> None:
        completion = engine.complete("Hola", temperature=0)
        assert completion.timings.load_s is None, "a worker that does not stop is killed, and loaded anew"
        assert completion.timings.ttft_s is not None
        assert completion.timings.ttft_s < 2


def test_alone_it_takes_raw_prompts() -> None:
    with TransformersBackend(model_name=str(WEIGHTS), threads=1) as backend:
        assert backend.loaded
        prompt = "<|im_start|>user\nHola<|im_end|>\n<|im_start|>assistant\n"
        assert backend.generate(prompt, max_tokens=20, temperature=0)
    assert not backend.loaded


_LIGHT = """
import sys, tars_transformers.plugin as plugin
from tars_core.plugin import ModelRef, ProbeLimits
plugin.tars_probe(model=None, limits=ProbeLimits())
assert plugin.tars_probe(model=ModelRef.parse(sys.argv[1]), limits=ProbeLimits()).available
print([name for name in ("torch", "transformers", "huggingface_hub", "safetensors", "numpy") if name in sys.modules])
"""


def test_importing_and_probing_loads_no_runtime() -> None:
    done = subprocess.run([sys.executable, "-c", _LIGHT, str(WEIGHTS)], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
