"""One question to the daemon within a deadline, for the probe: httpx alone takes 0.3 s to import.

A socket's own limit starts anew with every byte, and looking up a name has none at all. So the question is asked in a
thread that is left behind when the time is up, and whose socket is closed then.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import TypeVar

import msgspec

from tars_ollama.address import Address

MAX_BODY = 64 * 2**20
"""Bytes. A list of thousands of models stays far below."""


T = TypeVar("T")


class NoAnswer(Exception):
    """The daemon is off, wedged, or something else listens there."""


class Reply(msgspec.Struct, frozen=True):
    """What came back."""

    status: int
    body: bytes


def ask(address: Address, path: str, body: object = None, *, deadline_s: float) -> Reply:
    """Send a GET, or with ``body`` a POST, and return the reply whatever its status. Raises :class:`NoAnswer`."""
    question = _Question(address, path, body, deadline_s)
    thread = threading.Thread(target=question.run, name="tars-ollama-ask", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if question.reply is not None:
        return question.reply
    if thread.is_alive():
        question.abandon()
        raise NoAnswer(_late(deadline_s))
    raise NoAnswer(question.failure)


def in_time(function: Callable[[], T], deadline_s: float) -> T | None:
    """Return what ``function`` returns, or ``None`` where that takes longer; it raises nothing."""
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(function()), name="tars-ollama-look", daemon=True)
    thread.start()
    thread.join(deadline_s)
    return results[0] if results else None


def _late(deadline_s: float) -> str:
    return f"no answer within {deadline_s:.1f} s"


class _Question:
    def __init__(self, address: Address, path: str, body: object, limit_s: float) -> None:
        self._address = address
        self._path = address.path + path
        self._body = body
        self._limit_s = limit_s
        self._socket: socket.socket | None = None
        self.reply: Reply | None = None
        self.failure = ""

    def run(self) -> None:
        try:
            self.reply = self._asked()
        except ConnectionRefusedError:
            self.failure = "nothing listens there"
        except TimeoutError:
            self.failure = _late(self._limit_s)
        except OSError as error:
            self.failure = error.strerror or str(error) or type(error).__name__
        except Exception as error:  # noqa: BLE001 - http.client raises HTTPException, ValueError, UnicodeError and more
            self.failure = f"what answers there does not speak HTTP ({type(error).__name__})"

    def abandon(self) -> None:
        """End the thread's wait."""
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)

    def _asked(self) -> Reply:
        if self._address.scheme not in ("http", "https"):
            raise OSError(f"Ollama speaks http or https, not {self._address.scheme}")
        place = self._address.host, self._address.port
        with socket.create_connection(place, timeout=self._limit_s) as self._socket:
            from http.client import HTTPConnection  # noqa: PLC0415 - 40 ms, where somebody listens

            connection = HTTPConnection(*place)
            connection.sock = self._socket if self._address.scheme == "http" else self._encrypted(self._socket)
            body = None if self._body is None else msgspec.json.encode(self._body)
            headers = {"Connection": "close"} | ({"Content-Type": "application/json"} if body else {})
            if self._address.private and (key := os.environ.get("OLLAMA_API_KEY")):
                headers["Authorization"] = f"Bearer {key}"  # as the ollama package sends it
            connection.request("GET" if body is None else "POST", self._path, body, headers)
            response = connection.getresponse()
            data = response.read(MAX_BODY + 1)
            if len(data) > MAX_BODY:
                raise ValueError("too much")
            return Reply(response.status, data)

    def _encrypted(self, plain: socket.socket) -> socket.socket:
        import ssl  # noqa: PLC0415 - for the daemon behind a proxy

        return ssl.create_default_context().wrap_socket(plain, server_hostname=self._address.host)
