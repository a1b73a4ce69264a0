"""The loop, step by step, in this process: who is decoded when, and what llama.cpp's codes lead to."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

import tars_demo_model
from tars_core.plugin import (
    BackendEvent,
    Finished,
    GenerateRequest,
    GenerationFailed,
    LoadFailed,
    LoadOptions,
    ModelRef,
    Progress,
    SamplingParams,
    TextDelta,
    least_tokens,
)

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it takes 6 to 15 minutes to build")

from tars_llamacpp.context import Context, Row
from tars_llamacpp.model import load
from tars_llamacpp.plugin import tars_load

if TYPE_CHECKING:
    from tars_llamacpp.loop import LoopedModel

GGUF = tars_demo_model.WEIGHTS / "tars-demo.gguf"
UNIT = "<|im_end|>"  # one token, whatever the vocabulary merges
OPTIONS = LoadOptions(threads=1, concurrency=4, context_length=1024)


def _request(prompt: str, max_tokens: int = 20) -> GenerateRequest:
    return GenerateRequest(prompt=prompt, sampling=SamplingParams(temperature=0, max_tokens=max_tokens))


def _prepared(model: LoopedModel, request: GenerateRequest) -> GenerateRequest:
    """Prepare a request as the core does: with its tokens, and the answer bounded by the room they leave."""
    tokens = tuple(model.tokenize(request.prompt))
    room = model.context_length - len(tokens)
    sampling = msgspec.structs.replace(request.sampling, max_tokens=min(request.sampling.max_tokens, room))
    return model.prepare(msgspec.structs.replace(request, tokens=tokens, sampling=sampling))


@pytest.fixture
def model() -> Iterator[LoopedModel]:
    model = load(GGUF, OPTIONS, lambda *_: None, threading.Event())
    yield model
    model.close()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[list[Row]]:
    """Return what will have been decoded, batch by batch."""
    batches: list[list[Row]] = []
    real = Context.decode

    def spy(context: Context, rows: Sequence[Row]) -> int:
        batches.append(list(rows))
        return real(context, rows)

    monkeypatch.setattr(Context, "decode", spy)
    return batches


@pytest.fixture
def answer_with(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes the next calls of ``llama_decode`` return these codes without computing."""
    real = Context.decode
    codes: list[int] = []

    def decode(context: Context, rows: Sequence[Row]) -> int:
        return codes.pop(0) if codes else real(context, rows)

    monkeypatch.setattr(Context, "decode", decode)
    return lambda *new: codes.extend(new)


def _run(model: LoopedModel, *requests: GenerateRequest) -> dict[int, list[BackendEvent | Exception]]:
    for request_id, request in enumerate(requests):
        model.submit(request_id, _prepared(model, request))
    return _finish(model, len(requests))


def _finish(model: LoopedModel, count: int) -> dict[int, list[BackendEvent | Exception]]:
    events: dict[int, list[BackendEvent | Exception]] = {}
    ended = 0
    while ended < count:
        for request_id, event in model.step():
            events.setdefault(request_id, []).append(event)
            ended += isinstance(event, Finished | Exception)
    assert model.step() == []
    return events


def _text(events: list[BackendEvent | Exception]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def test_a_prompt_is_read_in_pieces_and_told_after_each(model: LoopedModel) -> None:
    events = _run(model, _request(UNIT * 200))[0]
    done = [event.prompt_tokens_done for event in events if isinstance(event, Progress)]
    assert done == [64, 128, 192]
    assert isinstance(events[-1], Finished)


def test_an_answer_goes_on_while_another_prompt_is_read(model: LoopedModel) -> None:
    wild = SamplingParams(temperature=10, top_k=0, top_p=1, max_tokens=500, seed=1)
    model.submit(0, _prepared(model, GenerateRequest(prompt="Hola", sampling=wild)))
    model.step()
    model.submit(1, _prepared(model, _request(UNIT * 600)))
    steps = [model.step() for _ in range(9)]
    assert all((1, Progress) in [(request_id, type(event)) for request_id, event in step] for step in steps)
    tokens = [
        len(e.token_ids) for step in steps for request_id, e in step if request_id == 0 and isinstance(e, TextDelta)
    ]
    assert sum(tokens) >= 6  # the last may wait for the rest of their character
    model.cancel(0)
    model.cancel(1)
    assert [event.finish_reason for _, event in model.step() if isinstance(event, Finished)] == ["cancelled"] * 2


def test_a_cancel_takes_effect_in_the_next_step_and_is_counted_so_far(
    model: LoopedModel, decoded: list[list[Row]]
) -> None:
    model.submit(7, _prepared(model, _request(UNIT * 900)))
    model.step()
    model.cancel(7)
    decoded.clear()
    ((request_id, event),) = model.step()
    assert (request_id, decoded) == (7, [])
    assert isinstance(event, Finished)
    assert (event.finish_reason, event.usage.prompt_tokens, event.usage.completion_tokens) == ("cancelled", 900, 0)


def test_no_batch_holds_more_of_the_prompts_than_a_step_may(model: LoopedModel, decoded: list[list[Row]]) -> None:
    _run(model, *(_request(text * 90) for text in ("uno ", "dos ", "tres ", "cuatro ")))
    assert max(len(rows) for rows in decoded) <= 64 + 4


class TestACommonBeginning:
    """Is read, kept and shared in whole pieces of 64 tokens."""

    def test_of_prompts_that_come_together_is_read_once(self, model: LoopedModel, decoded: list[list[Row]]) -> None:
        requests = [_request(UNIT * 320 + f"{n}: Hola", max_tokens=3) for n in range(4)]
        together = [_text(events) for events in _run(model, *requests).values()]
        assert [len(rows) for rows in decoded[:5]] == [64] * 5
        assert sum(len(rows) for rows in decoded) < 320 + 4 * 40
        assert together == [_text(_run(model, request)[0]) for request in requests]

    def test_of_a_conversation_is_kept_for_its_next_turn(self, model: LoopedModel, decoded: list[list[Row]]) -> None:
        _run(model, _request(UNIT * 300))
        decoded.clear()
        events = _run(model, _request(UNIT * 400))[0]
        assert [len(rows) for rows in decoded[:3]] == [64, 64, 400 - 256 - 128]
        assert isinstance(events[-1], Finished)
        assert events[-1].usage.prompt_tokens == 400

    def test_of_another_conversation_survives_in_its_own_place(
        self, model: LoopedModel, decoded: list[list[Row]]
    ) -> None:
        one, other = _request(UNIT * 200, max_tokens=1), _request("<|im_start|>" * 200, max_tokens=1)
        _run(model, one)
        _run(model, other)
        for n in range(9):
            _run(model, _request(f"Hola {n}"))  # short ones keep nothing and push nobody out
        decoded.clear()
        _run(model, one)
        _run(model, other)
        assert [len(rows) for rows in decoded] == [8, 8]

    def test_leaves_the_last_token_to_be_read(self, model: LoopedModel, decoded: list[list[Row]]) -> None:
        _run(model, _request(UNIT * 128, max_tokens=1))
        decoded.clear()
        _run(model, _request(UNIT * 128, max_tokens=1))
        assert [len(rows) for rows in decoded] == [64]

    def test_changes_no_sampled_text(self, model: LoopedModel) -> None:
        def sample(prompt: str) -> str:
            wild = SamplingParams(temperature=3, top_p=1, seed=5, max_tokens=60)
            return _text(_run(model, GenerateRequest(prompt=prompt, sampling=wild))[0])

        prompts = [UNIT * 300 + "Hola", "Hola", UNIT * 64, UNIT * 300 + "Adiós", "¿Qué?"]
        assert [sample(prompt) for prompt in prompts] == [sample(prompt) for prompt in prompts]

    def test_is_not_waited_for_when_its_reader_is_cancelled(self, model: LoopedModel) -> None:
        model.submit(0, _prepared(model, _request(UNIT * 900)))
        model.submit(1, _prepared(model, _request(UNIT * 900, max_tokens=1)))
        model.step()
        model.cancel(0)
        events = _finish(model, 2)
        assert isinstance(events[1][-1], Finished)
        assert events[1][-1].usage.completion_tokens == 1


class TestNoRoomInTheCache:
    def test_is_made_from_what_idle_sequences_keep(self, model: LoopedModel, answer_with: Callable[..., None]) -> None:
        first = _run(model, _request("Hola"))
        _run(model, _request(UNIT * 100))
        answer_with(1)
        assert _text(_run(model, _request("Hola"))[0]) == _text(first[0])

    def test_ends_the_latest_request_and_no_other(self, model: LoopedModel, answer_with: Callable[..., None]) -> None:
        alone = _text(_run(model, _request("Hola"))[0])
        model.submit(0, _prepared(model, _request("Hola")))
        model.submit(1, _prepared(model, _request("Adiós")))
        answer_with(1)
        events = _finish(model, 2)
        assert _text(events[0]) == alone
        assert isinstance(events[0][-1], Finished)
        assert [str(event) for event in events[1]] == ["llama.cpp's key-value cache has no room left"]


@pytest.mark.parametrize("code", [2, -1, -3])
def test_after_a_code_that_leaves_the_cache_unknown_all_fail_and_the_next_starts_clean(
    model: LoopedModel, answer_with: Callable[..., None], code: int
) -> None:
    alone = _text(_run(model, _request("Hola"))[0])
    model.submit(0, _prepared(model, _request("Hola")))
    model.submit(1, _prepared(model, _request("Hola")))
    model.step()
    answer_with(code)
    with pytest.raises(GenerationFailed, match=rf"cannot decode \(code {code}\)"):
        model.step()
    assert model.step() == []
    assert _text(_run(model, _request("Hola"))[0]) == alone


def test_more_requests_than_places_wait_for_one(model: LoopedModel) -> None:
    events = _run(model, *(_request("Hola") for _ in range(9)))
    assert len({_text(one) for one in events.values()}) == 1


@pytest.mark.parametrize(
    ("said", "device"),
    [
        (["llama_prepare_model_devices: using device CUDA0 (NVIDIA H200) (0000:1b:00.0) - 142000 MiB free"], "cuda0"),
        (["something else"], "gpu"),
    ],
)
def test_the_device_is_the_gpu_that_llama_cpp_says_it_uses(
    monkeypatch: pytest.MonkeyPatch, said: list[str], device: str
) -> None:
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr("tars_llamacpp.log.lines", lambda: said)
    devices = []
    for options in (OPTIONS, msgspec.structs.replace(OPTIONS, device="cpu")):
        model = load(GGUF, options, lambda *_: None, threading.Event())
        devices.append(model.device)
        model.close()
    assert devices == [device, "cpu"]


def test_a_model_that_does_not_continue_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_cpp.llama_model_has_encoder", lambda _model: True)
    with pytest.raises(LoadFailed, match=r"tars-demo\.gguf is not a causal language model"):
        load(GGUF, OPTIONS, lambda *_: None, threading.Event())


def test_tokens_that_the_file_bans_are_never_sampled(model: LoopedModel, tmp_path: Path) -> None:
    def first(model: LoopedModel) -> int:
        return next(e.token_ids[0] for e in _run(model, _request("Hola"))[0] if isinstance(e, TextDelta))

    banned = first(model)
    file = tmp_path / "banned.gguf"
    file.write_bytes(_with_banned_token(GGUF.read_bytes(), banned))
    other = load(file, OPTIONS, lambda *_: None, threading.Event())
    assert first(other) != banned
    other.close()


def _with_banned_token(data: bytes, token: int) -> bytes:
    """Add an entry to a GGUF's header, and a second that keeps what follows aligned to 32 bytes."""
    key, filler = b"tokenizer.ggml.suppress_tokens", b"filler"
    ban = struct.pack("<Q", len(key)) + key + struct.pack("<IIQi", 9, 5, 1, token)  # an array of one int32
    head = struct.pack("<Q", len(filler)) + filler + struct.pack("<I", 8)  # a string
    pad = -(len(ban) + len(head) + 8) % 32
    entries = struct.unpack_from("<Q", data, 16)[0]
    return data[:16] + struct.pack("<Q", entries + 2) + ban + head + struct.pack("<Q", pad) + b"-" * pad + data[24:]


def test_a_task_that_it_cannot_do_is_refused() -> None:
    with pytest.raises(LoadFailed, match="llamacpp does not support the task 'embed'"):
        tars_load(ModelRef.parse(GGUF), LoadOptions(task="embed"), lambda *_: None, threading.Event())


def test_a_load_stops_when_it_is_cancelled() -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(LoadFailed, match=r"loading tars-demo\.gguf was cancelled"):
        load(GGUF, OPTIONS, lambda *_: None, cancel)


def test_a_prompt_refused_by_its_length_alone_is_told_no_more_tokens_than_it_has(model: LoopedModel) -> None:
    text = "TARS " * 300_000
    assert model.longest_token is not None
    assert model.context_length < least_tokens(text, model.longest_token) <= len(model.tokenize(text))
