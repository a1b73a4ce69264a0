"""llama.cpp's engine in a worker, with the demo model: what a user of the backend relies on."""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tars_demo_model
from tars_core import (
    BackendUnavailable,
    ContextLengthExceeded,
    InferenceEngine,
    StreamInterrupted,
    TextDelta,
    WorkerDied,
)
from tars_core.plugin import BackendEvent, LoadFailed, LoadOptions, ModelRef
from tars_core.testing.processes import alive, workers
from tars_xllamacpp.plugin import tars_load
from tars_xllamacpp.server import _Call

GGUF = tars_demo_model.WEIGHTS / "tars-demo.gguf"
NAME = "Me llamo TARS. Soy un modelo de demostración."


@pytest.fixture(scope="module")
def engine() -> Iterator[InferenceEngine]:
    with InferenceEngine(backend="xllamacpp", model=GGUF, threads=1) as engine:
        yield engine


def test_it_answers_and_counts_every_token(engine: InferenceEngine) -> None:
    completion = engine.complete("¿Cuál es tu nombre?", temperature=0)
    assert completion.text == NAME
    assert (completion.finish_reason, completion.device) == ("stop", "cpu")
    texts = [e for e in engine.stream("¿Cuál es tu nombre?", temperature=0) if isinstance(e, TextDelta)]
    assert "".join(e.text for e in texts) == NAME
    # The end token is sampled, counted, and has no text.
    assert completion.usage.completion_tokens == sum(len(e.token_ids) for e in texts) + 1


def test_sixteen_threads_get_the_answers_they_would_get_alone(engine: InferenceEngine) -> None:
    questions = ["¿Cuál es tu nombre?", "What is TARS?", "Hola", "Thank you"] * 4
    alone = [engine.generate(q, temperature=0) for q in questions[:4]] * 4
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda q: engine.generate(q, temperature=0), questions)) == alone


def test_sixteen_tasks_get_the_answers_they_would_get_alone(engine: InferenceEngine) -> None:
    questions = ["¿Qué es TARS?", "Who are you?", "Adiós", "What does probe do?"] * 4
    alone = [engine.generate(q, temperature=0) for q in questions[:4]] * 4

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(engine.agenerate(q, temperature=0) for q in questions))

    assert asyncio.run(ask_all()) == alone


def test_the_text_ends_before_a_stop_string_whose_tokens_are_counted(engine: InferenceEngine) -> None:
    completion = engine.complete("¿Cuál es tu nombre?", temperature=0, stop=["TARS. Soy"])
    assert (completion.text, completion.finish_reason) == ("Me llamo ", "stop")
    assert completion.usage.completion_tokens > len(["Me", "llamo"])


def test_max_tokens_ends_the_answer_with_length(engine: InferenceEngine) -> None:
    completion = engine.complete("¿Cuál es tu nombre?", temperature=0, max_tokens=3)
    assert (completion.finish_reason, completion.usage.completion_tokens) == ("length", 3)
    assert NAME.startswith(completion.text)


def test_a_huge_max_tokens_is_bounded_by_the_context(engine: InferenceEngine) -> None:
    completion = engine.complete("xyzzy", raw=True, temperature=10, top_p=1, top_k=0, max_tokens=2**40, seed=1)
    assert completion.usage.prompt_tokens + completion.usage.completion_tokens <= 512


def test_the_same_seed_gives_the_same_text_and_another_seed_another(engine: InferenceEngine) -> None:
    def sample(seed: int) -> str:
        return engine.generate("Hola", temperature=5, top_k=0, top_p=1, max_tokens=20, seed=seed)

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) == 4
    assert sample(2**32 - 1) == sample(2**32 - 1)
    assert sample(2**32 - 1) == sample(0), "the highest seed means 0 on every backend"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(engine: InferenceEngine) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        engine.generate("palabra " * 3000)
    assert caught.value.prompt_tokens > caught.value.context_length == 512


def test_a_long_prompt_does_not_hold_up_the_answers_of_others(engine: InferenceEngine) -> None:
    def ask() -> None:
        with pytest.raises(ContextLengthExceeded):
            engine.complete("a" * 2**23, raw=True)

    undisturbed = statistics.median(_gaps(engine, lambda: time.sleep(0.2)))
    assert max(_gaps(engine, ask)) < 20 * undisturbed + 1.0


def test_an_answer_of_one_token_has_no_speed_and_a_longer_one_has(engine: InferenceEngine) -> None:
    one, more = (engine.complete("Hola", temperature=0, max_tokens=n).timings.decode_tokens_per_s for n in (1, 3))
    assert one is None
    assert more is not None
    assert 1 < more < 100_000


def test_a_text_that_was_held_back_comes_with_all_its_tokens(engine: InferenceEngine) -> None:
    def pieces(*stop: str) -> list[TextDelta]:
        events = engine.stream("¿Cuál es tu nombre?", temperature=0, stop=stop)
        return [event for event in events if isinstance(event, TextDelta)]

    usual, held = pieces(), pieces("Me llamo Pepe")
    assert len(held) < len(usual)
    assert [token for piece in held for token in piece.token_ids] == [t for piece in usual for t in piece.token_ids]


class _Scripted:
    """An engine that sends what it was given."""

    def __init__(self, *pieces: tuple[str, int, int]) -> None:
        self._pieces = pieces

    def handle_completions(self, _body: bytes, callback: Callable[[bytes], bool]) -> None:
        for text, token, count in self._pieces:
            verbose = {"tokens": [token], "tokens_predicted": count}
            callback(json.dumps({"choices": [{"text": text}], "__verbose": verbose}).encode())


def test_a_character_of_several_tokens_comes_without_them_since_the_engine_names_only_the_last() -> None:
    reported: list[BackendEvent] = []
    _Call(b"{}", threading.Event(), reported.append).run(_Scripted(("a", 5, 1), ("🚀", 7, 5), ("", 8, 6), ("b", 9, 7)))
    told = [(event.text, event.token_ids) for event in reported if isinstance(event, TextDelta)]
    assert told == [("a", (5,)), ("🚀", ()), ("b", (8, 9))]


@pytest.mark.parametrize(("asked", "given"), [(20, 256), (300, 512), (100_000, 512), (None, 512)])
def test_the_context_is_what_the_engine_really_gives(asked: int | None, given: int) -> None:
    with InferenceEngine(backend="xllamacpp", model=GGUF, threads=1, context_length=asked) as engine:
        assert engine.load().context_length == given
        with pytest.raises(ContextLengthExceeded) as caught:
            engine.generate("palabra " * 3000)
        assert caught.value.context_length == given


def test_a_gguf_file_is_known_by_its_first_bytes_too(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(GGUF.read_bytes())
    with InferenceEngine(backend="xllamacpp", model=tmp_path / "model") as engine:
        assert engine.generate("¿Cuál es tu nombre?", temperature=0) == NAME


def test_a_stream_left_early_frees_its_slot(engine: InferenceEngine) -> None:
    for _ in range(6):  # more than there are slots
        for event in engine.stream("xyzzy", raw=True, temperature=10, top_k=0, top_p=1, max_tokens=400):
            if isinstance(event, TextDelta):
                break
    assert engine.generate("¿Cuál es tu nombre?", temperature=0) == NAME


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_killed_mid_answer_leaves_the_partial_text_and_the_next_call_works(number: signal.Signals) -> None:
    with InferenceEngine(backend="xllamacpp", model=GGUF, threads=1) as engine:
        with pytest.raises(StreamInterrupted) as caught:
            _read(engine, lambda: _signal_workers(number))
        assert caught.value.partial_text
        assert isinstance(caught.value.cause, WorkerDied)
        assert caught.value.cause.signal_name == number.name
        assert engine.generate("¿Cuál es tu nombre?", temperature=0) == NAME


def test_a_worker_that_hangs_mid_answer_is_ended_with_the_partial_text() -> None:
    with InferenceEngine(backend="xllamacpp", model=GGUF, threads=1, limits={"between_tokens_s": 1.0}) as engine:
        with pytest.raises(StreamInterrupted, match="between tokens") as caught:
            _read(engine, lambda: _signal_workers(signal.SIGSTOP))
        assert caught.value.partial_text
        assert engine.generate("¿Cuál es tu nombre?", temperature=0) == NAME


_LONG_ANSWER = f"""
from tars_core import InferenceEngine, TextDelta
engine = InferenceEngine(backend="xllamacpp", model={str(GGUF)!r}, threads=1)
while True:
    for event in engine.stream("xyzzy", raw=True, temperature=10, top_k=0, top_p=1, max_tokens=450):
        if isinstance(event, TextDelta):
            print(".", flush=True)
"""


def test_the_worker_ends_within_a_second_of_its_hosts_death() -> None:
    with subprocess.Popen([sys.executable, "-c", _LONG_ANSWER], stdout=subprocess.PIPE) as host:
        assert host.stdout is not None
        host.stdout.readline()
        (worker,) = workers(host.pid)
        host.kill()
    deadline = time.monotonic() + 1
    while alive(worker):
        assert time.monotonic() < deadline, "the worker outlived its host"


def test_ctrl_c_while_it_streams_stops_the_command_and_keeps_the_text() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background ignores it, and hands that on
    command = [sys.executable, "-m", "tars_core.cli", "run", "-m", str(GGUF), "-b", "xllamacpp", "xyzzy"]
    options = ["--temperature", "10", "--max-tokens", "450", "--seed", "3"]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        head = os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        rest, words = process.communicate(timeout=20)
    assert (process.returncode, words.decode().strip()) == (130, "stopped")
    assert (head + rest).endswith(b"\n")


def test_without_its_runtime_the_backend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("tars_xllamacpp.plugin.importlib.metadata.version", missing)
    with InferenceEngine(model=GGUF, plugins="xllamacpp") as engine:
        with pytest.raises(BackendUnavailable, match="pip install xllamacpp"):
            engine.generate("hola")
        (status,) = engine.backends()
    assert (status.available, status.hint) == (False, "pip install xllamacpp")


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_a_truncated_file_is_refused_from_its_header(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "short.gguf"
    file.write_bytes(GGUF.read_bytes()[:keep])
    with InferenceEngine(model=file) as engine, pytest.raises(BackendUnavailable, match=r"short\.gguf is not a valid"):
        engine.generate("hola")


def test_a_file_the_engine_cannot_load_gives_its_own_words(tmp_path: Path) -> None:
    file = tmp_path / "strange.gguf"
    # The header stays valid; the architecture is one that llama.cpp has never heard of.
    file.write_bytes(GGUF.read_bytes().replace(b"llama", b"xlama"))
    with InferenceEngine(model=file, backend="xllamacpp") as engine, pytest.raises(Exception, match="xlama"):
        engine.generate("hola")


def test_a_task_that_it_cannot_do_is_refused() -> None:
    with pytest.raises(LoadFailed, match="xllamacpp does not support the task 'rerank'"):
        tars_load(ModelRef.parse(GGUF), LoadOptions(task="rerank"), lambda *_: None, threading.Event())


def test_closing_the_engine_ends_the_worker() -> None:
    before = set(workers(os.getpid()))
    with InferenceEngine(backend="xllamacpp", model=GGUF, threads=1) as engine:
        engine.generate("Hola")
        assert len(set(workers(os.getpid())) - before) == 1
    assert set(workers(os.getpid())) <= before


def _gaps(engine: InferenceEngine, meanwhile: Callable[[], object]) -> list[float]:
    """Return the seconds from one piece of running answers to the next, until ``meanwhile`` returns."""
    gaps: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(meanwhile)
        while not other.done():
            events = engine.stream("xyzzy", raw=True, temperature=10, top_k=0, top_p=1, max_tokens=450, seed=3)
            came = [time.monotonic() for event in events if isinstance(event, TextDelta)]
            gaps += [after - before for before, after in itertools.pairwise(came)]
        other.result()
    return gaps


def _read(engine: InferenceEngine, at_first_text: Callable[[], None]) -> None:
    """Read a long answer; do something once it has begun."""
    begun = False
    for event in engine.stream("xyzzy", raw=True, temperature=10, top_k=0, top_p=1, max_tokens=450, seed=3):
        if isinstance(event, TextDelta) and not begun:
            begun = True
            at_first_text()


def _signal_workers(number: signal.Signals) -> None:
    for pid in workers(os.getpid()):
        os.kill(pid, number)
