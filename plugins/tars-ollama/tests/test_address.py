"""Where the daemon is looked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_ollama.address import Address
from tars_ollama.client import Client


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("", "http://127.0.0.1:11434"),
        ("  ", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        ("1.2.3.4:1234", "http://1.2.3.4:1234"),
        (":1234", "http://127.0.0.1:1234"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://1.2.3.4", "https://1.2.3.4:443"),
        ("https://1.2.3.4:4321/", "https://1.2.3.4:4321"),
        ("example.com", "http://example.com:11434"),
        ("https://example.com/a/b/", "https://example.com:443/a/b"),
        ("ollama.com", "https://ollama.com:443"),
        ("::1", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1]:1337", "http://[::1]:1337"),
        ("0.0.0.0", "http://127.0.0.1:11434"),  # noqa: S104 - nothing is bound
        ("0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("::", "http://[::1]:11434"),
        ("[::]:8080", "http://[::1]:8080"),
        (' "1.2.3.4:1234" ', "http://1.2.3.4:1234"),
        ("'1.2.3.4'", "http://1.2.3.4:11434"),
        ("1.2.3.4:66000", "http://1.2.3.4:11434"),
        ("1.2.3.4:-1", "http://1.2.3.4:11434"),
        ("1.2.3.4:port", "http://1.2.3.4:11434"),
        ("1.2.3.4:", "http://1.2.3.4:11434"),
        ("http://1.2.3.4:66000", "http://1.2.3.4:80"),
        ("https://1.2.3.4:port", "https://1.2.3.4:443"),
        ("http://me:secret@1.2.3.4:1234", "http://1.2.3.4:1234"),
        ("me:secret@localhost:1234", "http://localhost:1234"),
    ],
)
def test_every_form_that_ollama_takes_is_understood(text: str, url: str) -> None:
    assert Address.parse(text).url == url


@pytest.mark.parametrize("text", ["", "0.0.0.0:1", "localhost", "LOCALHOST:1", "127.9.9.9", "[::1]:5", "::"])
def test_this_machine_is_recognised(text: str) -> None:
    assert Address.parse(text).loopback


@pytest.mark.parametrize("text", ["example.com", "10.0.0.1", "https://ollama.com", "localhost.example.com", "::2"])
def test_another_machine_is_not_taken_for_this_one(text: str) -> None:
    assert not Address.parse(text).loopback


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    address = Address.parse(text)
    assert address.host
    assert 0 <= address.port < 2**16


@given(st.ip_addresses(), st.integers(1, 65535), st.sampled_from(["", "http://", "https://"]))
def test_an_address_with_a_port_is_taken_as_it_is(ip: object, port: int, scheme: str) -> None:
    text = f"{scheme}[{ip}]:{port}" if ":" in str(ip) else f"{scheme}{ip}:{port}"
    address = Address.parse(text)
    assert address.port == port
    assert address.host in (str(ip), "127.0.0.1", "::1")
    assert Address.parse(address.url) == address


def test_a_setting_goes_before_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "1.2.3.4")
    assert Address.find(None).host == "1.2.3.4"
    assert Address.find("5.6.7.8").host == "5.6.7.8"
    monkeypatch.delenv("OLLAMA_HOST")
    assert Address.find(None) == Address()


@pytest.mark.parametrize(
    ("address", "sent"),
    [("http://far.example", None), ("https://far.example", "Bearer sesame"), ("localhost:1", "Bearer sesame")],
)
def test_the_key_goes_over_no_network_in_clear(address: str, sent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_API_KEY", "sesame")
    assert Client(Address.parse(address))._client.headers.get("authorization") == sent
