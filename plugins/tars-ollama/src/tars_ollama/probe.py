"""What can be told without the worker: is the daemon there, has it the model, where does that run."""

from __future__ import annotations

import time
from functools import partial

from tars_core.plugin import BASIC_FEATURES, ProbeReport
from tars_ollama import store, wire
from tars_ollama.address import Address
from tars_ollama.ask import NoAnswer, Reply, ask, in_time
from tars_ollama.failures import read_fault

_OK, _NOT_FOUND = 200, 404
_OTHER = "what answers there is not Ollama"
_PREFERENCE = 50  # llama.cpp beneath, as with the others, but behind a socket and a queue
_START = "ollama serve"
OLLAMAS_CHAT = BASIC_FEATURES | {"renders_chat", "parses"}
"""Of a model whose messages are left to Ollama; raw prompts are answered with all that the model writes."""


def daemon(address: Address, deadline_s: float) -> ProbeReport:
    """Say whether the daemon answers."""
    try:
        reply = ask(address, "/api/version", deadline_s=deadline_s)
    except NoAnswer as failure:
        return _absent(address, str(failure))
    if reply.status == _OK:
        return ProbeReport(available=True, features=OLLAMAS_CHAT, deviations=_DEVIATIONS)
    return _absent(address, _OTHER) if reply.status == _NOT_FOUND else _refused(address, reply)


_DEVIATIONS = (
    "text comes without the ids of its tokens",
    "a model whose file cannot be read gets Ollama's own chat template",
)


def named(name: str, address: Address, deadline_s: float) -> ProbeReport:
    """Say what the daemon knows of one model."""
    if not name.strip():
        return ProbeReport(available=False, reason="no model is named", hint="name one: ollama:llama3")
    until = time.monotonic() + deadline_s
    try:
        reply = ask(address, "/api/show", {"model": name}, deadline_s=deadline_s)
        if reply.status != _OK:
            return _refused(address, reply, name)
        show = wire.decode(reply.body, wire.Show)
        running = ask(address, "/api/ps", deadline_s=max(0.1, until - time.monotonic()))
        loaded = wire.find(name, wire.models(running.body)) if running.status == _OK else None
    except NoAnswer as failure:
        return _absent(address, str(failure))
    except ValueError:
        return _absent(address, _OTHER)
    if not show.generates:
        return ProbeReport(available=False, reason=f"it writes no text; it can {', '.join(show.capabilities or ())}")
    # A cold disk may take seconds for a file of many tensors; without its weights' identity the model still runs.
    left_s = max(0.0, until - time.monotonic())
    header = None if show.adapted else in_time(partial(store.header, show, local=address.loopback), left_s)
    return ProbeReport(
        available=True,
        device=loaded.device if loaded is not None else None,
        weights_id=header.weights_id if header is not None else None,
        context_length=show.trained_context,
        features=OLLAMAS_CHAT if store.renders_chat(show, header) else BASIC_FEATURES,
        preference=_PREFERENCE,
    )


def offered(address: Address, deadline_s: float) -> list[str]:
    """Return the names of the models that are here and write text."""
    try:
        reply = ask(address, "/api/tags", deadline_s=deadline_s)
        listed = wire.models(reply.body) if reply.status == _OK else []
    except (NoAnswer, ValueError):
        return []
    return [
        m.name for m in listed if m.name and not m.remote_host and "completion" in (m.capabilities or ["completion"])
    ]


def _absent(address: Address, why: str) -> ProbeReport:
    hint = _START if address.loopback else f"on {address.host}: {_START}; or set OLLAMA_HOST to where it runs"
    return ProbeReport(available=False, reason=f"Ollama does not answer at {address.url}: {why}", hint=hint)


def _refused(address: Address, reply: Reply, name: str | None = None) -> ProbeReport:
    error = read_fault(reply.status, reply.body).to_error(name or "this", loading=True)
    return ProbeReport(available=False, reason=f"{error.message} (at {address.url})", hint=error.hint)
