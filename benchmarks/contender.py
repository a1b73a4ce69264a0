"""One contender in a process of its own: loads the model, then answers each line of stdin with one of stdout, in JSON.

``contender.py KIND MODEL SLOTS``; an order is ``{"prompts": [...], "answer_tokens": N}``. Other versions of TARS run
this too, with their own interpreter: only what every version has is used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

THREADS = 2
CONTEXT = 2048
"""Tokens for each request. Not each contender's own default, which differ."""


@dataclass
class Answer:
    """What one caller got, and when."""

    first_at: float = 0.0
    ended_at: float = 0.0
    prompt_tokens: int = 0
    answer_tokens: int = 0

    def text_came(self) -> None:
        """Note the time, if this text is the first."""
        self.first_at = self.first_at or time.perf_counter()


Ask: TypeAlias = Callable[[str, int, Answer], None]
"""Streams the answer to a prompt, of so many tokens."""


def _llama(model: str, _slots: int) -> Ask:
    from llama_cpp import Llama  # noqa: PLC0415 - one of several

    llama = Llama(model, n_ctx=CONTEXT, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    one_after_another = threading.Lock()

    def ask(prompt: str, tokens: int, answer: Answer) -> None:
        with one_after_another:
            chunks: Any = llama.create_completion(
                prompt, max_tokens=tokens, temperature=0, repeat_penalty=1, stream=True
            )
            for chunk in chunks:
                if chunk["choices"][0]["text"]:
                    answer.text_came()
                    answer.answer_tokens += 1  # every token of this model is whole text
            answer.prompt_tokens = llama.n_tokens + 1 - answer.answer_tokens  # the last token is not decoded

    return ask


def _server(model: str, slots: int) -> Ask:
    import xllamacpp  # noqa: PLC0415 - one of several

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = slots
    params.n_ctx = slots * CONTEXT
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    params.verbosity = 1
    params.hostnames = [str(Path.cwd() / "server.sock")]  # else it listens on a TCP port
    server = xllamacpp.Server(params)

    def ask(prompt: str, tokens: int, answer: Answer) -> None:
        def on_chunk(chunk: dict[str, Any]) -> bool:
            if any(choice["text"] for choice in chunk.get("choices", ())):
                answer.text_came()
            if usage := chunk.get("usage"):
                answer.prompt_tokens, answer.answer_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            return False  # go on

        order = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "repeat_penalty": 1, "stream": True}
        server.handle_completions(order, on_chunk)

    return ask


def _tars(backend: str, model: str, slots: int) -> Ask:
    from tars_core import Finished, InferenceEngine, TextDelta  # noqa: PLC0415 - one of several

    engine = InferenceEngine(model=model, backend=backend, concurrency=slots, threads=THREADS, context_length=CONTEXT)

    def ask(prompt: str, tokens: int, answer: Answer) -> None:
        for event in engine.stream(prompt, raw=True, temperature=0, repeat_penalty=1, max_tokens=tokens):
            if isinstance(event, TextDelta):
                answer.text_came()
            elif isinstance(event, Finished):
                usage = event.completion.usage
                answer.prompt_tokens, answer.answer_tokens = usage.prompt_tokens, usage.completion_tokens

    return ask


KINDS: dict[str, tuple[Callable[[str, int], Ask], tuple[str, ...]]] = {
    "llama": (_llama, ("llama-cpp-python",)),
    "server": (_server, ("xllamacpp",)),
    "llamacpp": (functools.partial(_tars, "llamacpp"), ("tars-core", "llama-cpp-python")),
    "xllamacpp": (functools.partial(_tars, "xllamacpp"), ("tars-core", "xllamacpp")),
}
"""How each is loaded, and which packages it consists of."""


def _run(ask: Ask, prompts: list[str], answer_tokens: int) -> dict[str, object]:
    """Let one caller for each prompt ask at the same moment; return tokens/s and what each caller got."""
    began = 0.0

    def begin() -> None:
        nonlocal began
        began = time.perf_counter()

    together = threading.Barrier(len(prompts), action=begin)

    def call(prompt: str) -> Answer:
        answer = Answer()
        together.wait()
        ask(prompt, answer_tokens, answer)
        answer.ended_at = time.perf_counter()
        return answer

    with ThreadPoolExecutor(len(prompts)) as callers:
        answers = list(callers.map(call, prompts))
    return {
        "seconds": max(answer.ended_at for answer in answers) - began,
        "first_s": [answer.first_at - began for answer in answers],
        "prompt_tokens": [answer.prompt_tokens for answer in answers],
        "answer_tokens": [answer.answer_tokens for answer in answers],
    }


def _main(kind: str, model: str, slots: str) -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)  # what native code prints is no reply

        def reply(value: object) -> None:
            replies.write(json.dumps(value) + "\n")
            replies.flush()

        load, packages = KINDS[kind]
        ask = load(model, int(slots))
        reply({package: importlib.metadata.version(package) for package in packages})
        for line in sys.stdin:
            reply(_run(ask, **json.loads(line)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
