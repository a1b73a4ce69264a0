"""The frames between the host and a worker: msgpack, each behind its length in four bytes, little-endian."""

from __future__ import annotations

import functools
import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

import msgspec

from tars_core._version import __version__
from tars_core.hookspecs import LoadOptions
from tars_core.types.errors import RequestError
from tars_core.types.events import BackendFinished, Progress, ReasoningDelta, TextDelta, ToolCallDelta
from tars_core.types.failures import Failure
from tars_core.types.messages import Message
from tars_core.types.models import ModelRef
from tars_core.types.request import EmbedRequest, GenerateRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

_LENGTH = struct.Struct("<I")
MAX_FRAME = 256 * 2**20
"""Bytes. Above every real frame; a length beyond it means that something else wrote into the pipe."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """Both: who speaks. The first frame in each direction; this frame itself never changes."""

    version: str
    frames: str
    """A digest of all frames' fields: two versions that differ in it do not understand each other."""
    place: str
    """The folder of the package."""


class Load(msgspec.Struct, frozen=True, kw_only=True, tag="load"):
    """Host: import the plugin and load the model. Once, after ``Hello``."""

    plugin: str
    """The entry point's name."""
    target: str
    """The entry point's value, ``module`` or ``module:attribute``."""
    model: ModelRef
    options: LoadOptions


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Host: answer. With messages, their prompt is still to be rendered."""

    request_id: int
    request: GenerateRequest


class Embed(msgspec.Struct, frozen=True, kw_only=True, tag="embed"):
    """Host: turn texts into vectors; an ``Embedded`` follows."""

    request_id: int
    request: EmbedRequest


class Render(msgspec.Struct, frozen=True, kw_only=True, tag="render"):
    """Host: put messages into the model's form; a ``Rendered`` follows."""

    request_id: int
    messages: tuple[Message, ...]
    template_options: str = "{}"


class Tokenize(msgspec.Struct, frozen=True, kw_only=True, tag="tokenize"):
    """Host: turn a prompt into tokens; ``Tokens`` follow."""

    request_id: int
    prompt: str


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
    features: frozenset[str] = frozenset()
    has_template: bool = False
    """Whether the model brings a chat template."""


class LoadRefused(msgspec.Struct, frozen=True, kw_only=True, tag="load_refused"):
    """Worker: the load failed; the process ends."""

    failure: Failure


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The terminal item of a request that did not finish."""

    failure: Failure


class Rendered(msgspec.Struct, frozen=True, kw_only=True, tag="rendered"):
    """The terminal item of ``Render``."""

    prompt: str


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="tokens"):
    """The terminal item of ``Tokenize``."""

    ids: tuple[int, ...]


class Embedded(msgspec.Struct, frozen=True, kw_only=True, tag="embedded"):
    """The terminal item of ``Embed``: the fields of :class:`~tars_core.types.results.Embeddings`."""

    data: bytes
    count: int
    dimensions: int
    prompt_tokens: int


Terminal: TypeAlias = BackendFinished | Failed | Rendered | Tokens | Embedded
Item: TypeAlias = Progress | TextDelta | ReasoningDelta | ToolCallDelta | Terminal


class Events(msgspec.Struct, frozen=True, kw_only=True, tag="events"):
    """Worker: what one step brought, for any number of requests."""

    items: tuple[tuple[int, Item], ...]


HostFrame: TypeAlias = Hello | Load | Generate | Embed | Render | Tokenize | Cancel
WorkerFrame: TypeAlias = Hello | LoadProgress | Loaded | LoadRefused | Events

_IN_FRAMES = (__name__, "tars_core.hookspecs", *(f"tars_core.types.{name}" for name in (
    "events", "failures", "messages", "models", "request", "results")))  # fmt: skip
"""Where the types of frames and of their fields are defined."""

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Loaded | Events)


@functools.cache
def hello() -> Hello:
    """Return this side's own greeting."""
    found: dict[str, list[tuple[str, str]]] = {}
    waiting: list[type] = [msgspec.Struct]
    while waiting:
        subclasses: list[type] = waiting.pop().__subclasses__()
        for kind in subclasses:
            waiting.append(kind)
            if kind.__module__ in _IN_FRAMES:
                found[kind.__name__] = [(name, str(annotation)) for name, annotation in kind.__annotations__.items()]
    digest = hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:16]
    return Hello(version=__version__, frames=digest, place=str(Path(__file__).parents[1]))


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
