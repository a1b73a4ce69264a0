"""Where the daemon listens: ``OLLAMA_HOST`` in every form that Ollama's own client accepts."""

from __future__ import annotations

import ipaddress
import os
import re

import msgspec

_PORT = 11434
_SCHEME_PORTS = {"http": 80, "https": 443}
_LOCAL = "127.0.0.1"
_PORT_DIGITS = re.compile(r"\+?[0-9]{1,9}", re.ASCII)


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """A daemon's address, taken apart."""

    scheme: str = "http"
    host: str = _LOCAL
    port: int = _PORT
    path: str = ""
    """In front of ``/api``, where a proxy serves it there; no slash at the end."""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``text`` as Ollama does: a port that is none is replaced by the default, and nothing is an error."""
        text = text.strip().strip("\"'").strip()
        scheme, separator, rest = text.partition("://")
        if not separator:
            scheme, rest = ("https", "ollama.com:443") if text == "ollama.com" else ("http", text)
        default = _SCHEME_PORTS.get(scheme, _PORT) if separator else _PORT
        place, slash, path = rest.partition("/")
        host, port = _split(place.rpartition("@")[2])  # a user's name and password are dropped, as Ollama does
        valid = port is not None and _PORT_DIGITS.fullmatch(port) and int(port) < 2**16
        return cls(
            scheme=scheme,
            host=_connectable(host),
            port=int(port) if port is not None and valid else default,
            path=(slash + path).rstrip("/"),
        )

    @classmethod
    def find(cls, setting: str | None) -> Address:
        """Return the address that is set, else what ``OLLAMA_HOST`` says, else Ollama's default."""
        return cls.parse(setting if setting is not None else os.environ.get("OLLAMA_HOST", ""))

    @property
    def url(self) -> str:
        """The address as one text; ``/api`` follows."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"

    @property
    def private(self) -> bool:
        """Whether nobody else reads what is sent there, such as a key."""
        return self.scheme == "https" or self.loopback

    @property
    def loopback(self) -> bool:
        """Whether it is this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def _split(place: str) -> tuple[str, str | None]:
    """Part host and port; a bare IPv6 address has no port."""
    if place.startswith("["):
        host, bracket, port = place[1:].partition("]")
        if bracket and port.startswith(":"):
            return host, port[1:]
        return host, None
    if place.count(":") != 1:
        return place, None
    host, _, port = place.partition(":")
    return host, port


def _connectable(host: str) -> str:
    """Turn what a server that listens everywhere binds to (nothing, ``0.0.0.0``, ``::``) into where it is reached."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or _LOCAL
    if not address.is_unspecified:
        return str(address)
    return _LOCAL if address.version == 4 else "::1"  # noqa: PLR2004 - IPv4
