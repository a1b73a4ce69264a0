"""The backend in a worker, with the demo model: what its users rely on."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import itertools
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tars_demo_model
from tars_core import (
    AllBackendsFailed,
    BackendUnavailable,
    ContextLengthExceeded,
    InferenceEngine,
    ModelNotFound,
    StreamEvent,
    StreamInterrupted,
    TextDelta,
    WorkerDied,
)
from tars_core.testing.processes import workers
from tars_llamacpp import LlamaCppBackend

GGUF = tars_demo_model.WEIGHTS / "tars-demo.gguf"
UNIT = "<|im_end|>"  # one token, whatever the vocabulary merges

needs_runtime = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="llama-cpp-python is not installed: it takes 6 to 15 minutes to build",
)


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine(backend="llamacpp", model=GGUF, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def answer(engine: InferenceEngine) -> str:
    """Return a greedy answer; what it says is the demo model's business."""
    return engine.complete("¿Qué es TARS?", temperature=0).text


def _long_answer(engine: InferenceEngine) -> Iterator[StreamEvent]:
    return engine.stream("xyzzy", raw=True, temperature=10, top_k=0, top_p=1, max_tokens=450, seed=3)


def _gaps(engine: InferenceEngine, meanwhile: Callable[[], object]) -> list[float]:
    """Return the seconds from one piece of running answers to the next, until ``meanwhile`` returns."""
    gaps: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(meanwhile)
        while not other.done():
            came = [time.monotonic() for event in _long_answer(engine) if isinstance(event, TextDelta)]
            gaps += [after - before for before, after in itertools.pairwise(came)]
        other.result()
    return gaps


@needs_runtime
class TestAnAnswer:
    def test_is_streamed_with_its_tokens_and_ends_with_an_end_token_that_is_counted(
        self, engine: InferenceEngine, answer: str
    ) -> None:
        events = list(engine.stream("¿Qué es TARS?", temperature=0))
        deltas = [e for e in events if isinstance(e, TextDelta)]
        completion = engine.complete("¿Qué es TARS?", temperature=0)
        assert "".join(e.text for e in deltas) == completion.text == answer
        assert len(deltas) > 5
        assert (completion.finish_reason, completion.device) == ("stop", "cpu")
        assert completion.usage.completion_tokens == sum(len(e.token_ids) for e in deltas) + 1

    def test_knows_its_speed(self, engine: InferenceEngine) -> None:
        speed = engine.complete("¿Qué es TARS?", temperature=0).timings.decode_tokens_per_s
        assert speed is not None
        assert speed > 10

    def test_of_one_token_has_no_speed(self, engine: InferenceEngine) -> None:
        assert engine.complete("¿Qué es TARS?", max_tokens=1).timings.decode_tokens_per_s is None

    @pytest.mark.parametrize("size", [1, 4, 11])
    def test_ends_before_a_stop_string_however_tokens_cut_it(
        self, engine: InferenceEngine, answer: str, size: int
    ) -> None:
        for at in range(0, len(answer) - size, 5):
            stop = answer[at : at + size]
            completion = engine.complete("¿Qué es TARS?", temperature=0, stop=[stop, "never said"])
            assert (completion.text, completion.finish_reason) == (answer[: answer.find(stop)], "stop")

    def test_keeps_the_text_that_only_began_like_a_stop_string(self, engine: InferenceEngine, answer: str) -> None:
        completion = engine.complete("¿Qué es TARS?", temperature=0, stop=[answer[-6:] + " and more"])
        assert completion.text == answer

    def test_counts_the_tokens_of_a_stop_string(self, engine: InferenceEngine, answer: str) -> None:
        whole = engine.complete("¿Qué es TARS?", temperature=0).usage
        stopped = engine.complete("¿Qué es TARS?", temperature=0, stop=[answer[:1]])
        assert (stopped.text, stopped.usage.completion_tokens) == ("", 1)
        assert stopped.usage.prompt_tokens == whole.prompt_tokens

    def test_is_cut_by_max_tokens_between_whole_characters(self, engine: InferenceEngine, answer: str) -> None:
        for limit in range(1, 12):
            completion = engine.complete("¿Qué es TARS?", temperature=0, max_tokens=limit)
            assert (completion.finish_reason, completion.usage.completion_tokens) == ("length", limit)
            assert answer.startswith(completion.text)

    def test_is_bounded_by_the_context_where_max_tokens_is_huge(self, engine: InferenceEngine) -> None:
        completion = engine.complete(UNIT * 500, raw=True, temperature=10, top_k=0, top_p=1, max_tokens=2**40, seed=3)
        assert (completion.finish_reason, completion.usage.completion_tokens) == ("length", 12)

    def test_of_a_base_model_ends_before_the_next_turn(self, engine: InferenceEngine) -> None:
        completion = engine.complete("User:" * 50, raw=True, temperature=0, repeat_penalty=1.0)
        assert "User:" not in completion.text


@needs_runtime
class TestSampling:
    def test_repeats_with_the_seed_and_differs_without(self, engine: InferenceEngine) -> None:
        def sample(seed: int) -> str:
            return engine.generate("Hola", temperature=5, top_k=0, top_p=1, max_tokens=20, seed=seed)

        assert [sample(seed) for seed in (1, 2**32 - 1)] == [sample(seed) for seed in (1, 2**32 - 1)]
        assert len({sample(seed) for seed in range(4)}) == 4

    def test_takes_the_highest_seed_for_0_as_every_backend_does(self, engine: InferenceEngine) -> None:
        highest, lowest = (
            engine.generate("Hola", temperature=5, top_k=0, top_p=1, max_tokens=20, seed=seed)
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
        assert engine.complete("¿Qué es TARS?", **{**wide, **narrow}, seed=1).text == answer  # type: ignore[arg-type]

    @pytest.mark.parametrize("extreme", [{"repeat_penalty": 1e-300}, {"top_k": 2**31 - 1}, {"min_p": 1 - 1e-12}])
    def test_at_the_edge_of_the_ranges_still_answers(self, engine: InferenceEngine, extreme: dict[str, float]) -> None:
        completion = engine.complete("Hola", max_tokens=5, seed=1, **extreme)  # type: ignore[arg-type]
        assert completion.usage.completion_tokens >= 1


@needs_runtime
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

    @pytest.mark.parametrize("size", [2**20, 2**25])  # tokenised; refused by its length alone
    def test_however_long_does_not_hold_up_the_answers_of_others(self, engine: InferenceEngine, size: int) -> None:
        def ask() -> None:
            with pytest.raises(ContextLengthExceeded):
                engine.complete("a" * size, raw=True)

        undisturbed = statistics.median(_gaps(engine, lambda: time.sleep(0.2)))
        assert max(_gaps(engine, ask)) < 20 * undisturbed + 1.0

    @pytest.mark.parametrize("text", ["Hola", "¿Qué? 👩‍🚀", "<|im_start|>user\nHola<|im_end|>\n", "a\0b" * 99])
    def test_is_tokenised_alone_as_it_is_for_an_answer(self, engine: InferenceEngine, text: str) -> None:
        for raw in (True, False):
            usage = engine.complete(text, raw=raw, max_tokens=1).usage
            assert len(engine.tokenize(text, raw=raw)) == usage.prompt_tokens

    def test_is_tokenised_alone_however_long_it_is(self, engine: InferenceEngine) -> None:
        assert len(engine.tokenize(UNIT * 1000, raw=True)) == 1000

    @pytest.mark.parametrize(
        "text", ["a\0b", "\U0010ffff\ufeff\u202e\u0300", "<|im_start|>" * 9, "\N{OGHAM SPACE MARK}."]
    )
    def test_can_hold_every_character(self, engine: InferenceEngine, text: str) -> None:
        assert engine.complete(text, raw=True, max_tokens=3).usage.prompt_tokens > 0

    def test_counts_the_tokens_that_were_in_the_cache(self, engine: InferenceEngine) -> None:
        first, again = (engine.complete(UNIT * 300, raw=True, max_tokens=1).usage for _ in range(2))
        assert first == again
        assert first.prompt_tokens == 300


@needs_runtime
class TestManyAtOnce:
    QUESTIONS = ("¿Cuál es tu nombre?", "What is TARS?", "Hola", "Thank you")

    def test_sixteen_threads_get_the_answers_they_would_get_alone(self, engine: InferenceEngine) -> None:
        alone = [engine.generate(q, temperature=0) for q in self.QUESTIONS] * 4
        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(lambda q: engine.generate(q, temperature=0), self.QUESTIONS * 4)) == alone

    def test_sixteen_tasks_in_one_batch_get_the_answers_they_would_get_alone(self) -> None:
        async def ask_all(engine: InferenceEngine) -> list[str]:
            return await asyncio.gather(*(engine.agenerate(q, temperature=0) for q in self.QUESTIONS * 4))

        with InferenceEngine(backend="llamacpp", model=GGUF, threads=1, concurrency=16) as engine:
            alone = [engine.generate(q, temperature=0) for q in self.QUESTIONS] * 4
            assert asyncio.run(ask_all(engine)) == alone


@needs_runtime
class TestACancel:
    def test_while_it_answers_frees_its_place(self) -> None:
        with InferenceEngine(backend="llamacpp", model=GGUF, threads=1, concurrency=1) as engine:
            for _ in range(3):
                for event in _long_answer(engine):
                    if isinstance(event, TextDelta):
                        break
            self._still_loaded(engine)

    def test_while_it_reads_the_prompt_frees_its_place(self) -> None:
        with InferenceEngine(backend="llamacpp", model=GGUF, threads=1, concurrency=1, context_length=8_000) as engine:
            engine.complete("Hola")
            whole = engine.complete("xyz" + UNIT * 7_000, raw=True, max_tokens=1).timings.ttft_s
            for _ in range(3):
                with pytest.raises(asyncio.TimeoutError):
                    asyncio.run(self._give_up_soon(engine))
            # A cancel that waited for the prompt would show in the answer after it.
            assert whole is not None
            assert self._still_loaded(engine) < whole / 2

    async def _give_up_soon(self, engine: InferenceEngine) -> None:
        await asyncio.wait_for(engine.acomplete(UNIT * 7_000, raw=True), timeout=0.1)

    def _still_loaded(self, engine: InferenceEngine) -> float:
        """Ask once more; return the seconds until the first text."""
        completion = engine.complete("Hola", temperature=0)
        assert completion.timings.load_s is None, "a worker that does not stop is killed, and loaded anew"
        assert completion.timings.ttft_s is not None
        return completion.timings.ttft_s


@needs_runtime
class TestAWorker:
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
    def test_killed_mid_answer_leaves_the_partial_text_and_the_next_call_works(self, number: signal.Signals) -> None:
        with InferenceEngine(backend="llamacpp", model=GGUF, threads=1) as engine:
            with pytest.raises(StreamInterrupted) as caught:
                self._read_and_kill(engine, number)
            assert caught.value.partial_text
            assert isinstance(caught.value.cause, WorkerDied)
            assert caught.value.cause.signal_name == number.name
            assert engine.generate("Hola", temperature=0)

    def _read_and_kill(self, engine: InferenceEngine, number: signal.Signals) -> None:
        alive = True
        for event in _long_answer(engine):
            if isinstance(event, TextDelta) and alive:
                alive = False
                for pid in workers(os.getpid()):
                    os.kill(pid, number)

    def test_ends_with_its_engine(self) -> None:
        before = set(workers(os.getpid()))
        with InferenceEngine(backend="llamacpp", model=GGUF, threads=1) as engine:
            engine.generate("Hola")
            assert len(set(workers(os.getpid())) - before) == 1
        assert set(workers(os.getpid())) <= before


@needs_runtime
class TestLoading:
    @pytest.mark.parametrize("keep", [0, 10, 1000, -100])
    def test_a_truncated_file_is_refused_from_its_header(self, tmp_path: Path, keep: int) -> None:
        file = tmp_path / "short.gguf"
        file.write_bytes(GGUF.read_bytes()[:keep])
        with (
            InferenceEngine(model=file, backend="llamacpp") as engine,
            pytest.raises(BackendUnavailable, match=r"short\.gguf is not a valid"),
        ):
            engine.generate("hola")

    def test_a_file_llama_cpp_cannot_load_gives_its_own_words(self, tmp_path: Path) -> None:
        file = tmp_path / "strange.gguf"
        # The header stays valid; the architecture is one that llama.cpp has never heard of.
        file.write_bytes(GGUF.read_bytes().replace(b"llama", b"xlama"))
        with (
            InferenceEngine(model=file, backend="llamacpp") as engine,
            pytest.raises(AllBackendsFailed, match=r"cannot load strange\.gguf: .*unknown model architecture: 'xlama'"),
        ):
            engine.generate("hola")

    def test_a_missing_shared_library_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
        with (
            InferenceEngine(model=GGUF, backend="llamacpp") as engine,
            pytest.raises(AllBackendsFailed, match=r"cannot import llama_cpp: Shared library .* not found"),
        ):
            engine.generate("hola")

    def test_progress_is_told(self) -> None:
        told: list[tuple[str, float, str]] = []
        with InferenceEngine(
            backend="llamacpp", model=GGUF, threads=1, on_load=lambda *news: told.append(news)
        ) as engine:
            engine.load()
        fractions = [fraction for _, fraction, _ in told]
        assert fractions == sorted(fractions)
        assert fractions[-1] > 0.9
        assert ("llamacpp", 0.0, "loading tars-demo.gguf") in told

    def test_a_context_that_memory_refuses_is_halved(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", _SHORT_OF_MEMORY], capture_output=True, text=True, timeout=60, check=False
        )
        context_length, finish_reason = done.stdout.split() or pytest.fail(done.stderr)
        assert 512 <= int(context_length) < WANTED_CONTEXT
        assert finish_reason == "stop"

    @pytest.mark.parametrize(("kind", "device"), [("cuda", "cuda"), ("metal", "metal"), ("cpu", "cpu")])
    def test_the_device_it_was_built_for_is_seen_in_its_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, device: str
    ) -> None:
        info = tmp_path / "llama_cpp_python-0.3.99.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.99\n")
        files = ("include/ggml-cuda.h", "llama_cpp/lib/libggml-base.so", f"llama_cpp/lib/libggml-{kind}.so")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        monkeypatch.syspath_prepend(str(tmp_path))
        with InferenceEngine(plugins="llamacpp") as engine:
            (status,) = engine.backends()
        assert (status.available, status.device) == (True, device)

    def test_the_probe_guesses_the_device_that_the_load_then_uses(self, engine: InferenceEngine) -> None:
        (candidate,) = engine.plan().candidates
        assert (candidate.report.device == "cpu") == (engine.load().device == "cpu")

    def test_on_the_cpu_nothing_else_is_used(self) -> None:
        with InferenceEngine(backend="llamacpp", model=GGUF, threads=1, device="cpu", gpu_layers=99) as engine:
            loaded = engine.load()
        assert (loaded.device, loaded.context_length, loaded.concurrency) == ("cpu", 512, 4)


WANTED_CONTEXT = 2**18  # for four requests: 2 GiB, at 2 KiB a token
_SHORT_OF_MEMORY = f"""
import resource
from tars_core import InferenceEngine
resource.setrlimit(resource.RLIMIT_AS, (1300 * 2**20, -1))
with InferenceEngine(
    backend="llamacpp", model={str(GGUF)!r}, threads=1, context_length={WANTED_CONTEXT}, concurrency=4
) as engine:
    print(engine.load().context_length, engine.complete("Hola", temperature=0).finish_reason)
"""


def test_without_its_runtime_the_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("tars_llamacpp.plugin.importlib.metadata.distribution", missing)
    with InferenceEngine(model=GGUF, plugins="llamacpp") as engine:
        with pytest.raises(BackendUnavailable, match=r"pip install llama-cpp-python .*C\+\+ compiler"):
            engine.generate("hola")
        (status,) = engine.backends()
    assert (status.available, status.reason) == (False, "the package llama-cpp-python is not installed")


class TestTheBackendAlone:
    @needs_runtime
    def test_loads_at_once_and_continues_raw_prompts(self, engine: InferenceEngine) -> None:
        with LlamaCppBackend(model_path=GGUF, threads=1) as backend:
            assert backend.loaded
            text = backend.generate("Me llamo", max_tokens=8, temperature=0)
            assert text == engine.complete("Me llamo", raw=True, max_tokens=8, temperature=0).text.strip() != ""
        assert not backend.loaded

    def test_raises_with_the_reason_where_it_cannot_load(self, tmp_path: Path) -> None:
        with pytest.raises(ModelNotFound, match="there is no file"):
            LlamaCppBackend(model_path=tmp_path / "missing.gguf")
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"GGUF")
        with pytest.raises(BackendUnavailable, match=r"broken\.gguf is not a valid GGUF file"):
            LlamaCppBackend(model_path=broken)

    def test_is_imported_without_any_runtime_or_other_backend(self) -> None:
        code = "import sys, tars_llamacpp; print(*{n.partition('.')[0] for n in sys.modules}, sep='\\n')"
        names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert "tars_llamacpp" in names
        assert not {"llama_cpp", "numpy", "xllamacpp", "ollama", "torch", "transformers", "pydantic"} & set(names)
