"""The frames between the host and a worker."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars_core.hookspecs import LoadOptions
from tars_core.types.events import BackendFinished, Progress, TextDelta
from tars_core.types.failures import Failure
from tars_core.types.messages import Message
from tars_core.types.models import ModelRef
from tars_core.types.request import EmbedRequest, GenerateRequest, SamplingParams
from tars_core.types.results import Timings, Usage
from tars_core.worker.protocol import (
    MAX_FRAME,
    Cancel,
    Embed,
    Embedded,
    Events,
    Failed,
    FrameReader,
    Generate,
    HostFrame,
    Load,
    Loaded,
    LoadProgress,
    LoadRefused,
    Render,
    Rendered,
    Tokenize,
    Tokens,
    WorkerFrame,
    encode,
    host_frames,
    worker_frames,
)

LETTERS = "a\0ñ€漢\U0001f680"
TEXTS = st.text(LETTERS, max_size=12)
COUNTS = st.integers(0, 2**40)
SECONDS = st.none() | st.floats(0, 1e6)
MODELS = st.builds(ModelRef, scheme=TEXTS, rest=TEXTS)
MESSAGES = st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=TEXTS)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 10),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(0, 2**31 - 1),
    min_p=st.floats(0, 0.99),
    repeat_penalty=st.floats(0.01, 10),
    max_tokens=st.integers(1, 2**63 - 1),
    stop=st.lists(st.text(LETTERS, min_size=1, max_size=5), max_size=3).map(tuple),
    seed=st.none() | st.integers(0, 2**32 - 1),
)
OPTIONS = st.builds(
    LoadOptions,
    device=st.sampled_from(["auto", "cpu", "gpu"]),
    context_length=st.none() | COUNTS,
    gpu_layers=st.none() | st.integers(-1, 100),
    allow_download=st.booleans(),
)
FAILURES = st.builds(
    Failure, kind=TEXTS, message=TEXTS, hint=st.none() | TEXTS, prompt_tokens=st.none() | COUNTS, context_length=COUNTS
)
ITEMS = st.one_of(
    st.builds(Progress, prompt_tokens_done=COUNTS),
    st.builds(
        TextDelta, text=st.text(LETTERS, min_size=1, max_size=12), token_ids=st.lists(COUNTS, max_size=3).map(tuple)
    ),
    st.builds(
        BackendFinished,
        finish_reason=st.sampled_from(["stop", "length", "cancelled"]),
        usage=st.builds(Usage, prompt_tokens=COUNTS, completion_tokens=COUNTS),
        timings=st.builds(Timings, load_s=SECONDS, ttft_s=SECONDS, decode_tokens_per_s=SECONDS),
    ),
    st.builds(Failed, failure=FAILURES),
    st.builds(Rendered, prompt=TEXTS),
    st.builds(Tokens, ids=st.lists(COUNTS, max_size=3).map(tuple)),
    st.builds(Embedded, data=st.binary(max_size=8), count=COUNTS, dimensions=COUNTS, prompt_tokens=COUNTS),
)
HOST_FRAMES: st.SearchStrategy[HostFrame] = st.one_of(
    st.builds(Load, plugin=TEXTS, target=TEXTS, model=MODELS, options=OPTIONS),
    st.builds(
        Generate,
        request_id=COUNTS,
        request=st.builds(
            GenerateRequest, messages=st.lists(MESSAGES, max_size=3).map(tuple), prompt=TEXTS, sampling=SAMPLING
        ),
    ),
    st.builds(Embed, request_id=COUNTS, request=st.builds(EmbedRequest, texts=st.lists(TEXTS, max_size=3).map(tuple))),
    st.builds(Render, request_id=COUNTS, messages=st.lists(MESSAGES, max_size=3).map(tuple)),
    st.builds(Tokenize, request_id=COUNTS, prompt=TEXTS),
    st.builds(Cancel, request_id=COUNTS),
)
WORKER_FRAMES: st.SearchStrategy[WorkerFrame] = st.one_of(
    st.builds(LoadProgress, fraction=st.floats(0, 1), note=TEXTS),
    st.builds(Loaded, device=TEXTS, context_length=COUNTS, concurrency=COUNTS),
    st.builds(LoadRefused, failure=FAILURES),
    st.builds(Events, items=st.lists(st.tuples(COUNTS, ITEMS), max_size=3).map(tuple)),
)


@st.composite
def pieces(draw: st.DrawFn, stream: bytes) -> list[bytes]:
    places = sorted(draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    return [stream[begin:end] for begin, end in pairwise([0, *places, len(stream)])]


def framed(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


def read(reader: FrameReader[HostFrame], stream: Sequence[bytes]) -> list[HostFrame]:
    return [frame for piece in stream for frame in reader.feed(piece)]


@given(st.data(), st.lists(HOST_FRAMES, max_size=3))
def test_what_the_host_sends_arrives_whole_and_in_order_under_any_chunking(
    data: st.DataObject, frames: list[HostFrame]
) -> None:
    stream = b"".join(map(encode, frames))
    assert read(host_frames(), data.draw(pieces(stream))) == frames


@given(st.data(), st.lists(WORKER_FRAMES, max_size=3))
def test_what_a_worker_sends_arrives_whole_and_in_order_under_any_chunking(
    data: st.DataObject, frames: list[WorkerFrame]
) -> None:
    reader = worker_frames()
    arrived = [frame for piece in data.draw(pieces(b"".join(map(encode, frames)))) for frame in reader.feed(piece)]
    assert arrived == frames


def test_a_frame_that_comes_byte_by_byte_is_read_with_its_last_byte() -> None:
    reader = host_frames()
    frame = Cancel(request_id=7)
    arrived = [list(reader.feed(bytes([byte]))) for byte in encode(frame)]
    assert arrived == [[] for _ in arrived[1:]] + [[frame]]


def test_a_frame_of_ten_megabytes_survives_many_pieces() -> None:
    frame = Generate(request_id=1, request=GenerateRequest(prompt="ñandú " * 1_500_000, sampling=SamplingParams()))
    stream = encode(frame)
    step = 2**16
    assert read(host_frames(), [stream[at : at + step] for at in range(0, len(stream), step)]) == [frame]


def test_a_reader_left_in_the_middle_goes_on_with_the_next_frame() -> None:
    reader = host_frames()
    frames = [Cancel(request_id=1), Cancel(request_id=2)]
    assert next(reader.feed(b"".join(map(encode, frames)))) == frames[0]
    assert list(reader.feed(b"")) == frames[1:]


def test_a_length_beyond_the_limit_is_refused_before_its_bytes_come() -> None:
    with pytest.raises(ValueError, match="a frame of"):
        list(host_frames().feed(struct.pack("<I", MAX_FRAME + 1)))


def test_text_that_a_library_printed_between_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="frame"):
        list(worker_frames().feed(b"llama_model_loader: loaded meta data\n"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"type": "no such frame"}),
        msgspec.msgpack.encode({"type": "cancel"}),
        msgspec.msgpack.encode({"type": "cancel", "request_id": "one"}),
        msgspec.msgpack.encode({"type": "cancel", "request_id": 1}) + b"\x00",
        msgspec.msgpack.encode({"type": "cancel", "request_id": 1})[:-1],
        msgspec.msgpack.encode({"type": "loaded", "device": "cpu", "context_length": 1, "concurrency": 1}),
        msgspec.msgpack.encode({"type": "generate", "request_id": 1, "sampling": {"temperature": -1}}),
        msgspec.msgpack.encode({"type": "generate", "request_id": 1, "sampling": {"stop": [""]}}),
        b"\x82\xa4type\xa6cancel\xaarequest_id" + b"\x91" * 100_000,
        b"\x83\xa4type\xa6cancel\xaarequest_id\x01\xa1x" + b"\x91" * 100_000 + b"\x00",
        b"\x82\xa4type\xa4load\xa6plugin\xa1\xff",
    ],
    ids=[
        "nothing",
        "reserved byte",
        "unknown type",
        "a field is missing",
        "a field has the wrong type",
        "bytes after the end",
        "a byte short",
        "the other side's frame",
        "a sampling value out of range",
        "an empty stop string",
        "nested and cut",
        "nested very deep",
        "text that is no UTF-8",
    ],
)
def test_a_frame_that_says_nothing_sound_is_a_value_error(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        list(host_frames().feed(framed(body)))


@given(st.binary(max_size=64).flatmap(lambda garbage: st.sampled_from([garbage, framed(garbage)])))
def test_garbage_is_a_value_error_or_waits_for_more(garbage: bytes) -> None:
    reader = host_frames()
    try:
        arrived = list(reader.feed(garbage))
    except ValueError:
        return
    assert arrived == []


@settings(max_examples=200)
@given(st.data(), WORKER_FRAMES)
def test_a_frame_with_one_byte_changed_is_another_frame_or_a_value_error(
    data: st.DataObject, frame: WorkerFrame
) -> None:
    stream = bytearray(encode(frame))
    place = data.draw(st.integers(0, len(stream) - 1))
    stream[place] = data.draw(st.integers(0, 255))
    try:
        arrived = list(worker_frames().feed(bytes(stream)))
    except ValueError:
        return
    assert all(isinstance(other, LoadProgress | Loaded | LoadRefused | Events) for other in arrived)
