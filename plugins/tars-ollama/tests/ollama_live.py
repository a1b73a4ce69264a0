"""The stand-in's other half: it really answers, from the demo model, through another engine of TARS."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ollama_stand_in import Client, Json, Request, StandIn

import tars_demo_model
from tars_core import ContextLengthExceeded, Finished, InferenceEngine, TextDelta

GGUF = tars_demo_model.WEIGHTS / "tars-demo.gguf"
NAME = "tars-demo"
CONTEXT = 512


@contextlib.contextmanager
def live_daemon(store: Path) -> Iterator[StandIn]:
    """Run a daemon that holds the demo model, with a store on disk at ``store``."""
    blobs = store / "blobs"
    blobs.mkdir(parents=True)
    blob = blobs / f"sha256-{hashlib.sha256(GGUF.read_bytes()).hexdigest()}"
    blob.symlink_to(GGUF)
    with InferenceEngine(backend="xllamacpp", model=GGUF, threads=1) as engine, StandIn() as server:
        daemon = _Daemon(engine, blob)
        for kind, behaviour in {
            "/api/version": daemon.version,
            "/api/tags": daemon.tags,
            "/api/ps": daemon.running,
            "/api/show": daemon.show,
            "load": daemon.load,
            "answer": daemon.answer,
            "count": daemon.count,
            "render": daemon.render,
        }.items():
            server.on(kind, behaviour)
        yield server


class _Daemon:
    def __init__(self, engine: InferenceEngine, blob: Path) -> None:
        self._engine = engine
        self._blob = blob
        self._loaded = False

    def version(self, client: Client, request: Request) -> None:
        del request
        client.send_json({"version": "0.0.0"})

    def tags(self, client: Client, request: Request) -> None:
        del request
        client.send_json({"models": [{"name": f"{NAME}:latest", "capabilities": ["completion"]}]})

    def running(self, client: Client, request: Request) -> None:
        del request
        entry = {"name": f"{NAME}:latest", "size": 10, "size_vram": 0, "context_length": CONTEXT}
        client.send_json({"models": [entry] if self._loaded else []})

    def show(self, client: Client, request: Request) -> None:
        if request.body["model"].removesuffix(":latest") != NAME:
            client.send_json({"error": f"model '{request.body['model']}' not found"}, 404)
            return
        client.send_json(
            {
                "modelfile": f"# made by a stand-in\nFROM {self._blob}\nTEMPLATE x\n",
                "template": "{{- range .Messages }}a Go template{{ end }}",
                "capabilities": ["completion"],
                "model_info": {"general.architecture": "llama", "llama.context_length": CONTEXT},
            }
        )

    def load(self, client: Client, request: Request) -> None:
        self._loaded = True
        client.send_json({"model": request.body["model"], "response": "", "done": True, "done_reason": "load"})

    def answer(self, client: Client, request: Request) -> None:
        events = self._engine.stream(**_question(request.body))
        begun = False
        try:
            for event in events:
                if client.gone():
                    client.server.hung_up.set()
                    return
                if not begun and isinstance(event, TextDelta | Finished):
                    begun = True
                    client.begin_stream()
                if isinstance(event, TextDelta):
                    client.send_line({"model": NAME, **_piece(request, event.text), "done": False})
                elif isinstance(event, Finished):
                    client.send_line({"model": NAME, **_piece(request, ""), **_end(event)})
                    client.end_stream()
        except ContextLengthExceeded as error:
            client.send_json(_overflow(error), 400)

    def count(self, client: Client, request: Request) -> None:
        try:
            *_, last = self._engine.stream(**_question(request.body))
        except ContextLengthExceeded as error:
            client.send_json(_overflow(error), 400)
            return
        assert isinstance(last, Finished)
        client.send_json({"model": NAME, **_piece(request, last.completion.text), **_end(last)})

    def render(self, client: Client, request: Request) -> None:
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in request.body["messages"])
        client.send_json({"done": False, "_debug_info": {"rendered_template": f"{turns}<|im_start|>assistant\n"}})


def _question(body: Json) -> dict[str, Any]:
    options = body["options"]
    names = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty", "seed", "stop")
    sampling = {name: options[name] for name in names} | {"max_tokens": options["num_predict"]}
    if "messages" in body:
        return {"messages": body["messages"], **sampling}
    return {"prompt": body["prompt"], "raw": True, **sampling}


def _piece(request: Request, text: str) -> Json:
    if request.path == "/api/chat":
        return {"message": {"role": "assistant", "content": text}}
    return {"response": text}


def _end(event: Finished) -> Json:
    usage = event.completion.usage
    return {
        "done": True,
        "done_reason": event.completion.finish_reason,
        "prompt_eval_count": usage.prompt_tokens,
        "eval_count": usage.completion_tokens,
        "eval_duration": 1_000_000 * usage.completion_tokens,
    }


def _overflow(error: ContextLengthExceeded) -> Json:
    figures = {"n_prompt_tokens": error.prompt_tokens, "n_ctx": error.context_length}
    # The runner's error comes as JSON inside the daemon's own.
    return {"error": json.dumps({"error": {"code": 400, "message": "too long", **figures}})}
