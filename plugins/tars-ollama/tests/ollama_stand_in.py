"""A stand-in for an Ollama daemon: real HTTP over a real socket.

It replays recordings of a real one byte for byte, chunk by chunk, with the way each of them ended; it fails in ways
that no recording shows; and it answers from a model through an engine of TARS, for whole flows.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

from typing_extensions import Self

RECORDINGS = Path(__file__).parent / "recordings"
REASONS = {200: "OK", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 500: "Internal Server Error"}

End: TypeAlias = Literal["clean", "reset", "hang"]
Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What a client sent."""

    method: str
    path: str
    headers: dict[str, str]
    raw_body: bytes

    @property
    def body(self) -> Json:
        body: Json = json.loads(self.raw_body) if self.raw_body else {}
        return body

    @property
    def kind(self) -> str:
        """Which of the backend's calls this is: ``load``, ``count`` and ``answer`` share a path."""
        if self.path not in ("/api/generate", "/api/chat"):
            return self.path
        if self.body.get("prompt") == "" and "messages" not in self.body:
            return "load"
        if self.body.get("_debug_render_only"):
            return "render"
        return "answer" if self.body.get("stream", True) else "count"


class Client:
    """The connection to one client."""

    def __init__(self, connection: socket.socket, server: StandIn) -> None:
        self._socket = connection
        self.server = server
        self._buffer = b""

    def send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            self.server.hung_up.set()
            raise

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Whatever')}", *(f"{k}: {v}" for k, v in headers.items())]
        self.send("\r\n".join([*lines, "", ""]).encode())

    def send_chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n%s\r\n" % (len(data), data))

    def send_json(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_head(status, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.send(body)

    def begin_stream(self) -> None:
        self.send_head(200, {"Content-Type": "application/x-ndjson", "Transfer-Encoding": "chunked"})

    def send_line(self, value: object) -> None:
        self.send_chunk(json.dumps(value).encode() + b"\n")

    def end_stream(self) -> None:
        self.send(b"0\r\n\r\n")

    def gone(self, within_s: float = 0.0) -> bool:
        """Say whether the client closes its end within the time."""
        until = time.monotonic() + within_s
        while not self.server.closing.is_set():
            readable, _, _ = select.select([self._socket], [], [], 0.01)
            if readable:
                try:
                    return not self._socket.recv(1, socket.MSG_PEEK)
                except OSError:
                    return True
            if time.monotonic() >= until:
                return False
        return True

    def hang(self) -> None:
        """Send nothing until the client gives up."""
        if self.gone(within_s=60) and not self.server.closing.is_set():
            self.server.hung_up.set()
        raise ConnectionAbortedError

    def drop(self) -> None:
        """End the connection without a word: FIN."""
        raise ConnectionAbortedError

    def reset(self) -> None:
        """End the connection by RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionAbortedError

    def requests(self) -> Iterator[Request]:
        while (head := self._until(b"\r\n\r\n")) is not None:
            first, *lines = head.decode("latin-1").split("\r\n")
            method, path, _ = first.split(" ")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines if line)}
            size = int(headers.get("content-length", 0))
            while len(self._buffer) < size:
                self._buffer += self._received()
            body, self._buffer = self._buffer[:size], self._buffer[size:]
            yield Request(method, path, headers, body)

    def _until(self, mark: bytes) -> bytes | None:
        while mark not in self._buffer:
            data = self._received()
            if not data:
                return None
            self._buffer += data
        head, _, self._buffer = self._buffer.partition(mark)
        return head

    def _received(self) -> bytes:
        while not self.server.closing.is_set():
            if select.select([self._socket], [], [], 0.05)[0]:
                return self._socket.recv(65536)
        return b""


Behaviour: TypeAlias = Callable[[Client, Request], None]


@dataclass
class StandIn:
    """The server. What it does with each kind of request is a list of behaviours; the last one stays."""

    behaviours: dict[str, list[Behaviour]] = field(default_factory=dict)
    received: list[Request] = field(default_factory=list)
    connections: int = 0
    hung_up: threading.Event = field(default_factory=threading.Event)
    """A client left while it was kept waiting."""
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        for thread in self._threads:
            thread.join(5)
        self._listener.close()

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def on(self, kind: str, *behaviours: Behaviour | str) -> None:
        """Do this with requests of that kind; a text names a recording."""
        self.behaviours[kind] = [replay(b) if isinstance(b, str) else b for b in behaviours]

    def bodies(self, kind: str) -> list[Json]:
        """Return the bodies of the requests of that kind, in order."""
        return [request.body for request in self.received if request.kind == kind]

    def _accept(self) -> None:
        while not self.closing.is_set():
            if select.select([self._listener], [], [], 0.05)[0]:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as Go's servers do
                self.connections += 1
                thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        client = Client(connection, self)
        with contextlib.suppress(ConnectionError), connection:
            for request in client.requests():
                self.received.append(request)
                waiting = self.behaviours.get(request.kind, [not_found])
                behaviour = waiting.pop(0) if len(waiting) > 1 else waiting[0]
                behaviour(client, request)


def not_found(client: Client, request: Request) -> None:
    """Answer as Ollama does where it knows no such path."""
    del request
    client.send_head(404, {"Content-Type": "text/plain", "Content-Length": "18"})
    client.send(b"404 page not found")


def answering(value: object, status: int = 200) -> Behaviour:
    """Return a behaviour that answers with JSON."""
    return lambda client, _: client.send_json(value, status)


def sending(data: bytes, end: End = "clean") -> Behaviour:
    """Return a behaviour that sends exactly these bytes, and then ends the connection, or hangs."""

    def behave(client: Client, request: Request) -> None:
        del request
        client.send(data)
        _end(client, end)
        client.drop()

    return behave


def replay(name: str, *, paced: bool = False, in_pieces_of: int | None = None) -> Behaviour:
    """Return a behaviour that plays a recording; ``paced`` at its own speed, ``in_pieces_of`` so many bytes a chunk."""
    recording: Json = json.loads((RECORDINGS / f"{name}.json").read_text("utf-8"))
    response = recording["response"]
    chunks = [(chunk["t"], chunk["data"].encode()) for chunk in response["chunks"]]
    if in_pieces_of is not None:
        whole = b"".join(data for _, data in chunks)
        chunks = [(0.0, whole[at : at + in_pieces_of]) for at in range(0, len(whole), in_pieces_of)]
    chunked = response["headers"].get("transfer-encoding") == "chunked" if response["headers"] else False

    def behave(client: Client, request: Request) -> None:
        del request
        began = time.monotonic()
        if response["status"] is not None:
            # Ollama sends the head with the first text.
            _wait(client, began + response["t_headers"] if paced else 0)
            client.send_head(response["status"], response["headers"])
        for at, data in chunks:
            _wait(client, began + at if paced else 0)
            if chunked:
                client.send_chunk(data)
            else:
                client.send(data)
        ended = response["ended"]
        _end(client, "clean" if ended == "clean" else "reset" if ended == "reset" else "hang")
        if chunked:
            client.end_stream()

    return behave


def _wait(client: Client, until: float) -> None:
    if (left := until - time.monotonic()) > 0 and client.gone(within_s=left):
        client.server.hung_up.set()
        raise ConnectionAbortedError


def _end(client: Client, end: End) -> None:
    if end == "reset":
        client.drop()  # what was recorded: the end of the stream before its last chunk
    elif end == "hang":
        client.hang()
