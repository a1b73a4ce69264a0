"""What carries frames between the host's event loop and a worker: a child process, or a thread of this one."""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import secrets
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from tars_core.system import processes
from tars_core.types.errors import BackendError, ContractError, LoadFailed, WorkerDied
from tars_core.worker import protocol
from tars_core.worker.protocol import Hello

if TYPE_CHECKING:
    from tars_core.worker.requests import Inbox

_log = logging.getLogger("tars_core.worker")
_STDERR_TAIL = 8_192
_EXIT_GRACE_S = 0.2
_TERM_GRACE_S = 1.0
_KILL = signal.SIGKILL if os.name == "posix" else signal.SIGTERM

OnFrame: TypeAlias = Callable[[protocol.WorkerFrame], None]
OnClosed: TypeAlias = Callable[[BackendError], None]


class Channel(Protocol):
    """Frames out by :meth:`send`; frames in, and the end, by the two callbacks it was opened with."""

    @property
    def pid(self) -> int | None:
        """The process, or ``None`` for a thread."""

    def send(self, frame: protocol.HostFrame) -> None:
        """Pass a frame on. After the end it is dropped: ``on_closed`` has told."""

    def kill(self) -> None:
        """End it now."""

    async def close(self) -> None:
        """End it in good order, by force where it does not follow.

        Return when it is gone, or after some seconds: a process may be stuck in the kernel, where no signal reaches it.
        """


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
        self._greeted = False
        self._started_by_it: list[int] = []
        self._mark = secrets.token_hex(8)
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self.pid: int | None = None

    @classmethod
    async def open(
        cls, name: str, on_frame: OnFrame, on_closed: OnClosed, *, model: str, python: str | None
    ) -> ProcessChannel:
        """Start the process.

        ``model`` is for those who list processes. Raises ``LoadFailed`` where the system refuses one, and
        ``ConfigError`` where there is no Python to run it.
        """
        loop = asyncio.get_running_loop()
        channel = cls(name, on_frame, on_closed)
        command = processes.command("tars_core.worker.child", name, model, python=python)
        try:
            # A session of its own: Ctrl-C in the terminal is for the host to handle.
            environment = processes.marked_environment(channel._mark)
            await loop.subprocess_exec(lambda: channel, *command, env=environment, start_new_session=True)
        except (OSError, RuntimeError) as error:  # no process, no descriptor, no thread to wait for it
            raise LoadFailed(
                f"the worker process could not be started: {error}",
                hint=f"check the setting python, which is {python}" if python else None,
            ) from error
        channel.send(protocol.hello())
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
                if isinstance(frame, Hello):
                    self._greet(frame)
                elif self._greeted:
                    self._on_frame(frame)
        except ValueError as error:
            self._broken = ContractError(f"the worker of {self._name} sent data that is not a frame: {error}")
            self.kill()

    def _greet(self, theirs: Hello) -> None:
        ours = protocol.hello()
        self._greeted = theirs.frames == ours.frames
        if not self._greeted:
            self._broken = LoadFailed(
                f"this program runs tars-core {ours.version} from {ours.place},"
                f" its worker a different one: {theirs.version} from {theirs.place}",
                hint="restart the program: tars-core was upgraded while it ran"
                " (or set python to an interpreter with the same tars-core)",
            )
            self.kill()

    def process_exited(self) -> None:
        if self.pid is not None:
            processes.kill_family(self.pid, self._mark, self._started_by_it)
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
        if self.pid is not None and not self._ended.done():
            self._started_by_it = processes.descendants(self.pid)
        for number in (signal.SIGTERM, _KILL):
            await asyncio.wait((self._ended,), timeout=_TERM_GRACE_S)
            if self._ended.done():
                return
            self._signal(number)
        await asyncio.wait((self._ended,), timeout=_TERM_GRACE_S)
        if not self._ended.done():
            _log.warning(
                "process %s of %s does not end although it was killed; it is left behind", self.pid, self._name
            )
            self._finish()

    def _signal(self, number: signal.Signals) -> None:
        if self._transport is None or self.pid is None or self._transport.get_returncode() is not None:
            return
        if number == _KILL:
            self._started_by_it = processes.descendants(self.pid)
        self._transport.send_signal(number)
        if number == _KILL:
            processes.kill_family(self.pid, self._mark, self._started_by_it)


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
        try:
            from tars_core.worker import serving  # noqa: PLC0415 - chat templates need jinja; a host has no other use

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
