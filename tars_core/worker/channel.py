"""What carries frames between the host's event loop and a worker: a child process, or a thread of this one."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable
from typing import Protocol, TypeAlias, cast

from tars_core import childprocess
from tars_core.errors import BackendError, ContractError, WorkerDied
from tars_core.worker import protocol

_log = logging.getLogger("tars_core.worker")
_STDERR_TAIL = 8_192
_EXIT_GRACE_S = 0.2
_TERM_GRACE_S = 1.0
_KILL = signal.SIGKILL if os.name == "posix" else signal.SIGTERM

Inbox: TypeAlias = "queue.SimpleQueue[protocol.HostFrame | None]"
OnFrame = Callable[[protocol.WorkerFrame], None]
OnClosed = Callable[[BackendError], None]


class Channel(Protocol):
    """Frames out by :meth:`send`; frames in, and the end, by the two callbacks it was opened with."""

    pid: int | None

    def send(self, frame: protocol.HostFrame) -> None:
        """Pass a frame on. After the end it is dropped: ``on_closed`` has told."""

    def kill(self) -> None:
        """End it now."""

    async def close(self) -> None:
        """End it in good order, by force where it does not follow; return when it is gone."""


class ProcessChannel(asyncio.SubprocessProtocol):
    """A child process. Its stderr goes to the log; the last 8 KiB are kept for the error."""

    def __init__(self, name: str, on_frame: OnFrame, on_closed: OnClosed) -> None:
        self._name = name
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._frames = protocol.worker_frames()
        self._stderr = bytearray()
        self._transport: asyncio.SubprocessTransport | None = None
        self._stdin: asyncio.WriteTransport | None = None
        self._broken: BackendError | None = None
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self.pid: int | None = None

    @classmethod
    async def open(cls, name: str, on_frame: OnFrame, on_closed: OnClosed) -> ProcessChannel:
        """Start the process; raise ``WorkerDied`` where the system refuses one."""
        loop = asyncio.get_running_loop()
        channel = cls(name, on_frame, on_closed)
        try:
            # A session of its own: Ctrl-C in the terminal is for the host to handle.
            await loop.subprocess_exec(
                lambda: channel, *childprocess.command("tars_core.worker.child"), start_new_session=True
            )
        except (OSError, RuntimeError) as error:  # no process, no descriptor, no thread to wait for it
            raise WorkerDied(returncode=None, stderr_tail=f"could not start it: {error}") from error
        return channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Casts: uvloop's transports have the methods and not the classes.
        self._transport = cast("asyncio.SubprocessTransport", transport)
        self.pid = self._transport.get_pid()
        self._stdin = cast("asyncio.WriteTransport", self._transport.get_pipe_transport(0))

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd != 1:
            self._stderr += data
            del self._stderr[:-_STDERR_TAIL]
            _log.debug("%s: %s", self._name, data.decode(errors="replace").rstrip())
            return
        try:
            for frame in self._frames.feed(data):
                self._on_frame(frame)
        except ValueError as error:
            self._broken = ContractError(f"the worker of {self._name} sent something that is no frame: {error}")
            self.kill()

    def process_exited(self) -> None:
        # Pipes may still hold the last frames; a grandchild may hold them open for ever.
        self._loop.call_later(_EXIT_GRACE_S, self._finish)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the exit code says more
        self._finish()

    def _finish(self) -> None:
        if self._ended.done():
            return
        self._ended.set_result(None)
        assert self._transport is not None  # noqa: S101
        returncode = self._transport.get_returncode()
        self._transport.close()
        tail = self._stderr.decode(errors="replace")
        self._on_closed(self._broken or WorkerDied(returncode=returncode, stderr_tail=tail))

    def send(self, frame: protocol.HostFrame) -> None:
        if self._stdin is not None and not self._ended.done():
            self._stdin.write(protocol.encode(frame))

    def kill(self) -> None:
        self._signal(_KILL)

    async def close(self) -> None:
        """Close the pipe, then SIGTERM, then SIGKILL, a second between them."""
        if self._stdin is not None:
            self._stdin.close()
        for number in (signal.SIGTERM, _KILL):
            await asyncio.wait((self._ended,), timeout=_TERM_GRACE_S)
            self._signal(number)
        await self._ended

    def _signal(self, number: signal.Signals) -> None:
        if self._transport is not None and self._transport.get_returncode() is None:
            self._transport.send_signal(number)


class ThreadChannel:
    """A thread of this process, for ``isolation="none"``. It cannot be killed: a hang stays."""

    pid: int | None = None

    def __init__(self, name: str, plugin: object | None, on_frame: OnFrame, on_closed: OnClosed) -> None:
        self._loop = asyncio.get_running_loop()
        self._inbox: Inbox = queue.SimpleQueue()
        self._closing = threading.Event()
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._ended = asyncio.Event()
        threading.Thread(target=self._serve, args=(plugin,), name=f"tars-{name}", daemon=True).start()

    def _serve(self, plugin: object | None) -> None:
        from tars_core.worker import serving  # noqa: PLC0415 - chat templates need jinja, and a host has no other use

        try:
            serving.serve(self._inbox, self._receive, self._closing, plugin)
        finally:
            self._call(self._finish)

    def _receive(self, frame: protocol.WorkerFrame) -> None:
        self._call(self._on_frame, frame)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _finish(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._on_closed(WorkerDied(returncode=None, stderr_tail="its thread ended"))

    def send(self, frame: protocol.HostFrame) -> None:
        self._inbox.put(frame)

    def kill(self) -> None:
        """Ask it to end and count it as gone: a thread cannot be forced."""
        self._closing.set()
        self._inbox.put(None)
        self._finish()

    async def close(self) -> None:
        """Ask it to end; wait a second for it, then leave it behind."""
        self._closing.set()
        self._inbox.put(None)
        try:
            await asyncio.wait_for(self._ended.wait(), _TERM_GRACE_S)
        except asyncio.TimeoutError:
            _log.warning("a backend running in this process did not end and was left behind")
            self._finish()
