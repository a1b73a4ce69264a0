"""The ``ollama`` package's client, with a thin layer of our own for what it gets wrong: see docs/decisions, 0007."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

import httpx
import msgspec

from tars_ollama.address import Address
from tars_ollama.ask import MAX_BODY
from tars_ollama.failures import Fault, read_fault, told

# Importing the package makes a client, which fails on a proxy variable that httpx cannot use.
_no_proxy = os.environ.get("no_proxy")
os.environ["no_proxy"] = "*"
try:
    import ollama
finally:
    del os.environ["no_proxy"]
    if _no_proxy is not None:
        os.environ["no_proxy"] = _no_proxy

_MAX_LINE = 16 * 2**20
_ERRORS = 400
_REDIRECTS = 300

# The engine's limits end a wait long before; this ends what it could not reach. A load, or the first token of a long
# prompt, may really take many minutes, in which the daemon sends nothing, not even a response's head.
_TIMEOUT = httpx.Timeout(3600.0, connect=10.0, write=60.0)


class Client(ollama.AsyncClient):
    """One connection pool to one daemon.

    ``whole`` and ``lines`` raise :class:`~tars_ollama.failures.Fault` for whatever goes wrong; what the package's own
    methods raise is one inside :func:`mapped`.

    Cancelling a task that waits here closes its connection: that is how Ollama is told to stop.
    """

    def __init__(self, address: Address) -> None:
        with mapped():
            super().__init__(
                address.url,
                follow_redirects=False,
                timeout=_TIMEOUT,
                headers={"Accept-Encoding": "identity"},
                limits=httpx.Limits(max_connections=None),
                trust_env=False,  # no proxy stands between a program and its daemon, and no .netrc is meant for it
                verify=ssl.create_default_context() if address.scheme == "https" else False,
            )
        if not address.private:
            self._client.headers.pop("Authorization", None)

    async def close(self) -> None:
        """Close the pool."""
        await self._client.aclose()  # the package's own method is not typed

    async def whole(self, path: str, body: object = None) -> bytes:
        """Return the body of the answer to a GET, or with ``body`` to a POST."""
        async with self._sent(path, body) as response:
            return await _read(response)

    async def lines(self, path: str, body: object) -> AsyncGenerator[bytes, None]:
        """Yield the answer's lines as they come."""
        async with self._sent(path, body) as response:
            splitter = LineSplitter()
            async for data in response.aiter_raw():
                for line in splitter.push(data):
                    yield line
            if line := splitter.rest():
                yield line

    @contextlib.asynccontextmanager
    async def _sent(self, path: str, body: object) -> AsyncIterator[httpx.Response]:
        with mapped():
            content = None if body is None else msgspec.json.encode(body)
            request = self._client.build_request("GET" if body is None else "POST", path, content=content)
            response = await self._client.send(request, stream=True)
            try:
                if response.status_code >= _ERRORS:
                    retry_after = response.headers.get("retry-after")
                    raise read_fault(response.status_code, await _read(response), retry_after=retry_after)
                if response.status_code >= _REDIRECTS:
                    raise Fault("it redirects elsewhere", status=response.status_code)
                yield response
            finally:
                await response.aclose()


async def _read(response: httpx.Response) -> bytes:
    data = bytearray()
    async for part in response.aiter_raw():
        data += part
        if len(data) > MAX_BODY:
            raise Fault("an answer of more than 64 MiB")
    return bytes(data)


class LineSplitter:
    r"""Cuts bytes into lines at ``\n`` alone: text in them holds U+0085, where ``str.splitlines`` would cut too."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def push(self, data: bytes) -> Iterator[bytes]:
        """Yield the lines that ``data`` completes; blank ones are left out."""
        *complete, rest = data.split(b"\n")
        for part in complete:
            line = b"".join([*self._parts, part])
            self._parts, self._size = [], 0
            if line.strip():
                yield line
        self._parts.append(rest)
        self._size += len(rest)
        if self._size > _MAX_LINE:
            raise Fault("a line of more than 16 MiB")

    def rest(self) -> bytes:
        """Return what came after the last line's end."""
        return b"".join(self._parts).strip()


@contextlib.contextmanager
def mapped() -> Iterator[None]:
    """Turn what httpx and the package raise, inside a stream too, into a :class:`Fault`."""
    try:
        yield
    except ollama.ResponseError as error:
        raise told(error.error, status=max(error.status_code, 200)) from error  # it gives -1 within a stream
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise Fault(str(error) or "no connection", refused=True) from error
    except httpx.TimeoutException as error:
        raise Fault(f"it stopped responding ({type(error).__name__})") from error
    except (AttributeError, TypeError) as error:  # the package, on an error that is no text, or no object around one
        raise Fault(f"it sent an invalid answer: {error}", status=200) from error
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
        raise Fault(f"the connection broke: {str(error) or type(error).__name__}") from error
