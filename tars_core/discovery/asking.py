"""How plugins are asked: all at once, each in a thread of its own, and nobody waits longer than the deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import msgspec

from tars_core.types.errors import told
from tars_core.types.public import brief, field_error

K = TypeVar("K", bound=Hashable)


class Late(msgspec.Struct, frozen=True):
    """Stands for an answer that did not come in time. The call goes on."""

    limit_s: float

    def __str__(self) -> str:
        return f"no answer within {self.limit_s:g} s"


class Asker:
    """Runs calls in daemon threads. Who asks again while a late call still runs waits for that one.

    So a plugin that hangs holds one thread for each question, however often it is asked.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, _Call] = {}

    def ask(self, calls: Mapping[K, Callable[[], object]], *, deadline_s: float) -> dict[K, object]:
        """Return each call's value, the exception it raised, or :class:`Late`."""
        until = time.monotonic() + deadline_s
        asked: dict[K, _Call] = {}
        for key, function in calls.items():
            running = self._running.get(key)
            if running is None or running.done.is_set():
                running = self._running[key] = _Call(key, function)
            asked[key] = running
        answers: dict[K, object] = {}
        for key, call in asked.items():
            if call.done.wait(max(0.0, until - time.monotonic())):
                answers[key] = call.answer
                self._running.pop(key, None)
            else:
                answers[key] = Late(deadline_s)
        return answers


class _Call:
    def __init__(self, key: Hashable, function: Callable[[], object]) -> None:
        self.done = threading.Event()
        self.answer: object = None
        threading.Thread(target=self._run, args=(function,), name=f"tars-ask-{key}", daemon=True).start()

    def _run(self, function: Callable[[], object]) -> None:
        try:
            self.answer = function()
        except BaseException as error:  # noqa: BLE001 - handed over to who asked
            self.answer = error
        self.done.set()


def fault(answer: object, kind: type[msgspec.Struct]) -> str | None:
    """Say what is wrong with an answer that should be a sound ``kind``; ``None`` where nothing is."""
    if isinstance(answer, BaseException):
        return told(answer)
    if not isinstance(answer, kind):
        return f"it must return {kind.__name__}, not {brief(answer)} ({type(answer).__name__})"
    try:
        msgspec.convert(msgspec.to_builtins(answer), kind)
    except (TypeError, ValueError) as error:
        return f"invalid {kind.__name__}: {field_error(error)}"
    return None
