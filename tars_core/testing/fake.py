"""A backend that does what a script says: answers, pauses, breaks rules, crashes.

Register any name as an entry point, ``alpha = "tars_core.testing.fake:alpha"``, and ask for the model
``fake:PATH``, the path of a JSON file in the form of :class:`Script`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias, cast

import msgspec

from tars_core.plugin import (
    BASIC_FEATURES,
    BackendEvent,
    CancelFlag,
    ContextLengthExceeded,
    Finished,
    GenerateRequest,
    GenerationFailed,
    LoadedModel,
    LoadFailed,
    LoadOptions,
    ModelNotFound,
    ModelRef,
    OutOfMemory,
    ProbeLimits,
    ProbeReport,
    Progress,
    ProgressCallback,
    RequestError,
    TextDelta,
    Usage,
    hookimpl,
)

_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (GenerationFailed, LoadFailed, ModelNotFound, OutOfMemory, RequestError, RuntimeError, MemoryError)
}
_BASE_ERRORS: dict[str, type[BaseException]] = {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}


class Say(msgspec.Struct, tag="say", frozen=True):
    """Yield ``text`` as one delta."""

    text: str


class Echo(msgspec.Struct, tag="echo", frozen=True):
    """Yield the prompt, a character at a time."""


class Seed(msgspec.Struct, tag="seed", frozen=True):
    """Yield the seed."""


class Wait(msgspec.Struct, tag="wait", frozen=True):
    """Do nothing for so long, or until cancelled; ``deaf`` waits on when cancelled."""

    seconds: float
    deaf: bool = False


class ReadPrompt(msgspec.Struct, tag="read_prompt", frozen=True):
    """Yield ``Progress``."""

    tokens: int


class Raise(msgspec.Struct, tag="raise", frozen=True):
    """Raise an exception by its name."""

    kind: str
    message: str = ""


class Overflow(msgspec.Struct, tag="overflow", frozen=True):
    """Refuse the prompt as too long."""

    prompt_tokens: int = 600


class Kill(msgspec.Struct, tag="kill", frozen=True):
    """End this process by a signal; with ``once``, only while that file does not exist, which is then made."""

    signal: str = "SIGKILL"
    once: str | None = None


class Exit(msgspec.Struct, tag="exit", frozen=True):
    """End this process with an exit code."""

    code: int = 3


class Print(msgspec.Struct, tag="print", frozen=True):
    """Write to fd 1, as native code does."""

    text: str


class Complain(msgspec.Struct, tag="complain", frozen=True):
    """Write to stderr."""

    text: str


class YieldJunk(msgspec.Struct, tag="yield_junk", frozen=True):
    """Yield what is no event."""


class Finish(msgspec.Struct, tag="finish", frozen=True):
    """Yield ``Finished``; the script goes on behind it."""


class Mark(msgspec.Struct, tag="mark", frozen=True):
    """Make a file, for a test that waits until the script is here."""

    path: str


class Fork(msgspec.Struct, tag="fork", frozen=True):
    """Leave a grandchild behind that holds all pipes open for so long."""

    seconds: float


class KillLater(msgspec.Struct, tag="kill_later", frozen=True):
    """End this process by SIGKILL so many seconds from now; the script goes on."""

    seconds: float


class Start(msgspec.Struct, tag="start", frozen=True):
    """Start a program that runs for a minute, and write its process id into a file.

    It stays in the process group, is in a ``session`` of its own, or has left its parents as a ``daemon`` does.
    """

    pid_file: str
    kind: Literal["group", "session", "daemon"] = "group"


Act: TypeAlias = (
    Say
    | Echo
    | Seed
    | Wait
    | ReadPrompt
    | Raise
    | Overflow
    | Kill
    | Exit
    | Print
    | Complain
    | YieldJunk
    | Finish
    | Mark
    | Fork
    | KillLater
    | Start
)


class BackendScript(msgspec.Struct, frozen=True):
    """What one fake backend does."""

    available: bool = True
    reason: str | None = None
    hint: str | None = None
    device: str = "cpu"
    weights_id: str | None = None
    memory_bytes: int | None = None
    preference: int = 50
    probe: tuple[Act, ...] = ()
    load: tuple[Act, ...] = ()
    prepare: tuple[Act, ...] = ()
    """Of a batched one, before it takes a request up."""
    generate: tuple[Act, ...] = (Say("hello"), Finish())
    features: tuple[str, ...] | None = None
    """What it declares when it is loaded; ``None``: what every model can."""
    guessed_features: tuple[str, ...] | None = None
    """What its probe declares."""
    batched: bool = False
    concurrency: int = 4
    context_shrunk: bool = False
    chat_template: str | None = None
    returns: str | None = None
    """What ``tars_generate`` returns instead of an iterator."""


class Script(msgspec.Struct, frozen=True):
    """Scripts by backend; a backend that is not named does not know the model."""

    backends: dict[str, BackendScript]

    @classmethod
    def read(cls, path: str) -> Script:
        """Read a script; raises ``OSError`` and ``msgspec.DecodeError``."""
        return msgspec.json.decode(Path(path).read_bytes(), type=cls)


class FakeModel(LoadedModel):
    """The script of a backend, loaded."""

    def __init__(self, script: BackendScript) -> None:
        super().__init__(
            device=script.device,
            context_length=512,
            concurrency=script.concurrency,
            features=BASIC_FEATURES if script.features is None else frozenset(script.features),
            chat_template=script.chat_template,
            context_shrunk=script.context_shrunk,
        )
        self.script = script

    def play(self, request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
        """Act the script out; finishes as cancelled once ``cancel`` is set."""
        said = 0
        for act in self.script.generate:
            for event in _act(act, request, cancel):
                said += isinstance(event, TextDelta)
                yield event
                if cancel.is_set():
                    break
            if isinstance(act, Finish):
                yield _finished(request, said, cancelled=cancel.is_set())
            elif cancel.is_set():
                yield _finished(request, said, cancelled=True)
                return


class BatchedFakeModel(FakeModel):
    """The same behind submit, step and cancel."""

    def __init__(self, script: BackendScript) -> None:
        super().__init__(script)
        self._running: dict[int, tuple[Iterator[BackendEvent], threading.Event]] = {}

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        for act in self.script.prepare:
            for _ in _act(act, request, threading.Event()):
                pass
        return request

    def submit(self, request_id: int, prepared: GenerateRequest) -> None:
        cancel = threading.Event()
        self._running[request_id] = self.play(prepared, cancel), cancel

    def step(self) -> Sequence[tuple[int, BackendEvent | Exception]]:
        brought: list[tuple[int, BackendEvent | Exception]] = []
        for request_id, (events, _) in list(self._running.items()):
            try:
                event: BackendEvent | Exception = next(events)
            except StopIteration:
                del self._running[request_id]
                continue
            except Exception as error:  # noqa: BLE001 - the contract takes an error as an event
                event = error
            brought.append((request_id, event))
            if isinstance(event, Finished | Exception):
                del self._running[request_id]
        return brought

    def cancel(self, request_id: int) -> None:
        if request_id in self._running:
            self._running[request_id][1].set()


class FakeBackend:
    """The hooks. ``name`` selects its part of the script."""

    def __init__(self, name: str) -> None:
        self._name = name

    @hookimpl
    def tars_probe(self, model: ModelRef | None, limits: ProbeLimits) -> ProbeReport | None:
        """Report what the script says."""
        del limits
        if model is None:
            return ProbeReport(available=True, device="cpu")
        script = self._script(model)
        if script is None:
            return None
        for act in script.probe:
            for _ in _act(act, None, threading.Event()):
                pass
        return ProbeReport(
            available=script.available,
            reason=script.reason,
            hint=script.hint,
            device=script.device,
            weights_id=script.weights_id,
            memory_bytes=script.memory_bytes,
            features=None if script.guessed_features is None else frozenset(script.guessed_features),
            preference=script.preference,
        )

    @hookimpl
    def tars_load(
        self, model: ModelRef, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag
    ) -> LoadedModel:
        """Act the script's loading out."""
        del options
        script = self._script(model)
        if script is None:
            raise LoadFailed(f"{model} says nothing about {self._name}")
        progress(0.0, "reading the script")
        for act in script.load:
            for _ in _act(act, None, cancel):
                pass
        progress(1.0, "done")
        return BatchedFakeModel(script) if script.batched else FakeModel(script)

    @hookimpl
    def tars_generate(self, loaded: FakeModel, request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
        """Act the script's answer out."""
        if loaded.script.returns is not None:
            return cast("Iterator[BackendEvent]", int(loaded.script.returns))
        return loaded.play(request, cancel)

    def _script(self, model: ModelRef) -> BackendScript | None:
        return Script.read(model.rest).backends.get(self._name) if model.scheme == "fake" else None


def __getattr__(name: str) -> FakeBackend:
    if name.startswith("_"):
        raise AttributeError(name)
    return FakeBackend(name)


def _finished(request: GenerateRequest, said: int, *, cancelled: bool) -> Finished:
    usage = Usage(prompt_tokens=len(request.prompt.split()), completion_tokens=said)
    return Finished(finish_reason="cancelled" if cancelled else "stop", usage=usage)


def _act(act: Act, request: GenerateRequest | None, cancel: CancelFlag) -> Iterator[BackendEvent]:
    match act:
        case Say(text=text):
            yield TextDelta(text=text)
        case Echo() if request is not None:
            yield from (TextDelta(text=character) for character in request.prompt)
        case Seed() if request is not None:
            yield TextDelta(text=str(request.sampling.seed))
        case ReadPrompt(tokens=tokens):
            yield Progress(prompt_tokens_done=tokens)
        case YieldJunk():
            yield cast("BackendEvent", "junk")
        case _:
            _do(act, cancel)


def _do(act: Act, cancel: CancelFlag) -> None:  # noqa: C901, PLR0912 - one case an act
    match act:
        case Wait(seconds=seconds, deaf=deaf):
            time.sleep(seconds) if deaf else cancel.wait(seconds)
        case Raise(kind=kind, message=message):
            raise _ERRORS[kind](message) if kind in _ERRORS else _BASE_ERRORS[kind](message)
        case Overflow(prompt_tokens=prompt_tokens):
            raise ContextLengthExceeded(prompt_tokens=prompt_tokens, context_length=512)
        case Kill(signal=name, once=once):
            if once is None or not Path(once).exists():
                if once is not None:
                    Path(once).touch()
                os.kill(os.getpid(), signal.Signals[name])
                time.sleep(60)  # SIGSTOP and signals on their way
        case Exit(code=code):
            os._exit(code)
        case Print(text=text):
            os.write(1, text.encode())
        case Complain(text=text):
            sys.stderr.write(text)
            sys.stderr.flush()
        case Mark(path=path):
            Path(path).touch()
        case Fork(seconds=seconds):
            if os.fork() == 0:
                time.sleep(seconds)
                os._exit(0)
        case KillLater(seconds=seconds):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        case Start(pid_file=pid_file, kind=kind):
            if kind == "daemon":
                subprocess.run(["sh", "-c", 'setsid sleep 60 & echo $! > "$0"', pid_file], check=True)  # noqa: S603, S607
            else:
                program = subprocess.Popen(["sleep", "60"], start_new_session=kind == "session")  # noqa: S607
                Path(pid_file).write_text(str(program.pid))
        case _:
            pass
