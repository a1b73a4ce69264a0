"""The frames between the host and a worker: msgpack, each behind its length in four bytes, little-endian."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import msgspec

from tars_core.errors import RequestError
from tars_core.events import BackendFinished, Progress, TextDelta
from tars_core.schema import Failure, LoadOptions, Message, ModelRef, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterator

_LENGTH = struct.Struct("<I")
MAX_FRAME = 256 * 2**20
"""Bytes. Above every real frame; a length beyond it means that something else wrote into the pipe."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Host: import the plugin and load the model. The first frame, once."""

    plugin: str
    """The entry point's name."""
    target: str
    """The entry point's value, ``module`` or ``module:attribute``."""
    model: ModelRef
    options: LoadOptions


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Host: answer. Either ``messages``, for the model's template, or a raw ``prompt``."""

    request_id: int
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    sampling: SamplingParams


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Host: stop this request; its terminal item still follows."""

    request_id: int


class LoadProgress(msgspec.Struct, frozen=True, kw_only=True, tag="load_progress"):
    """Worker: a sign of life while loading."""

    fraction: float
    note: str


class Loaded(msgspec.Struct, frozen=True, kw_only=True, tag="loaded"):
    """Worker: ready."""

    device: str
    context_length: int
    concurrency: int


class LoadRefused(msgspec.Struct, frozen=True, kw_only=True, tag="load_refused"):
    """Worker: the load failed; the process ends."""

    failure: Failure


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The terminal item of a request that did not finish."""

    failure: Failure


Item: TypeAlias = Progress | TextDelta | BackendFinished | Failed


class Events(msgspec.Struct, frozen=True, kw_only=True, tag="events"):
    """Worker: what one step brought, for any number of requests."""

    items: tuple[tuple[int, Item], ...]


HostFrame: TypeAlias = Load | Generate | Cancel
WorkerFrame: TypeAlias = LoadProgress | Loaded | LoadRefused | Events

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Loaded | Events)


def encode(frame: HostFrame | WorkerFrame) -> bytes:
    """Return the frame as bytes, length first. Raises ``RequestError`` for one that is too large to send."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME:
        raise RequestError(f"the request has {len(body)} bytes", hint=f"a worker takes {MAX_FRAME} at most")
    return _LENGTH.pack(len(body)) + body


def check(frame: Loaded | Events) -> None:
    """Raise ``TypeError`` or ``ValueError`` where a field does not hold what it must: nothing else checks plugins."""
    _decoder.decode(_encoder.encode(frame))


F = TypeVar("F")


class FrameReader(Generic[F]):
    """Cuts a stream of bytes into frames.

    Raises ``ValueError`` (``msgspec.DecodeError`` is one) where the bytes are no frames.
    """

    def __init__(self, frame_type: type[F]) -> None:
        self._decoder = msgspec.msgpack.Decoder(frame_type)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[F]:
        """Yield every frame that ``data`` completes."""
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _LENGTH.size:
                (size,) = _LENGTH.unpack_from(buffer, start)
                if size > MAX_FRAME:
                    raise ValueError(f"a frame of {size} bytes")
                end = start + _LENGTH.size + size
                if len(buffer) < end:
                    break
                try:
                    frame = self._decoder.decode(memoryview(buffer)[start + _LENGTH.size : end].tobytes())
                except RecursionError as error:
                    raise ValueError("a frame nested too deep") from error
                start = end
                yield frame
        finally:
            del buffer[:start]


def host_frames() -> FrameReader[HostFrame]:
    """Return a reader for what the host sends."""
    return FrameReader(HostFrame)  # type: ignore[arg-type]  # a union is no type to mypy


def worker_frames() -> FrameReader[WorkerFrame]:
    """Return a reader for what a worker sends."""
    return FrameReader(WorkerFrame)  # type: ignore[arg-type]
