"""One request's course: count where it may be too long, ask, pass on, ask again where the model's process crashed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from tars_core.plugin import (
    PENALTY_WINDOW,
    BackendEvent,
    ContextLengthExceeded,
    Finished,
    FinishReason,
    GenerateRequest,
    GenerationFailed,
    Message,
    Progress,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    Timings,
    Usage,
    engine_seed,
)
from tars_ollama import wire
from tars_ollama.client import Client
from tars_ollama.failures import Fault, told
from tars_ollama.loading import Facts, patient

_NUM_KEEP = 4
_TOKENS_BESIDE = 8  # a token stands for one byte at least, but BOS, EOS and the like for none
_TOKENS_A_TURN = 32  # the marks around one; what else a template says, it says once
_NANOSECONDS = 1e9

_BODY_END_S = 0.2
_OK = 200

T = TypeVar("T")
Report = Callable[[BackendEvent], None]


class Answer:
    """One request to the daemon, and what has come of it so far."""

    def __init__(self, client: Client, facts: Facts, request: GenerateRequest, report: Report) -> None:
        self._client = client
        self.facts = facts
        self._request = request
        self._report = report
        self._prompt_tokens = 0
        self._pieces = 0

    async def run(self) -> Finished:
        """Report the answer's events, and return the last. Raises a ``TarsError``."""
        try:
            prompt = await self._prompt()
            limit = await self._limit(prompt)
            return await self._recovering(partial(self._stream, prompt, limit))
        except Fault as fault:
            raise fault.to_error(self.facts.name, context_length=self.facts.context_length) from fault

    def cancelled(self) -> Finished:
        """Return the last event of an answer that was stopped."""
        usage = Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._pieces)
        return Finished(finish_reason="cancelled", usage=usage)

    # ---- what is asked -------------------------------------------------------------------------

    async def _prompt(self) -> dict[str, object]:
        """Return the part of the request that holds the prompt."""
        messages = self._request.messages
        if not messages:
            return {"prompt": self._request.prompt, "raw": True}
        if messages[-1].role != "assistant":
            return {"messages": [_turn(m) for m in messages]}
        # Chat closes a trailing assistant's turn, or repeats its text, as the model's template has it. Only Ollama
        # has that template here: let it render what comes before, and continue that as raw text.
        rendered = await self._rendered(messages[:-1])
        return {"prompt": rendered + messages[-1].text, "raw": True}

    async def _rendered(self, messages: tuple[Message, ...]) -> str:
        prompt: dict[str, object] = {"messages": [_turn(m) for m in messages], "_debug_render_only": True}
        chunk = await self._whole(prompt, num_keep=_NUM_KEEP)
        if chunk.debug_info is None or chunk.debug_info.rendered_template is None:
            raise GenerationFailed(
                f"this Ollama cannot continue a text with the template of {self.facts.name}",
                hint="upgrade Ollama, or end the conversation with a user's message",
            )
        return chunk.debug_info.rendered_template

    async def _limit(self, prompt: dict[str, object]) -> int:
        """Return how many tokens may be generated: beyond the context Ollama drops the oldest without a word."""
        wanted, context = self._request.sampling.max_tokens, self.facts.context_length
        if self._most_tokens(prompt) + wanted <= context:
            return wanted
        count = await self._count(prompt)
        if count >= context:
            raise ContextLengthExceeded(prompt_tokens=count, context_length=context)
        self._prompt_tokens = count
        self._report(Progress(prompt_tokens_done=count))
        return min(wanted, context - count)

    def _most_tokens(self, prompt: dict[str, object]) -> int:
        text = prompt.get("prompt")
        if isinstance(text, str):
            return len(text.encode()) + _TOKENS_BESIDE
        turns = self._request.messages
        around = self.facts.template_bytes + _TOKENS_A_TURN * (len(turns) + 1)
        return sum(len(turn.text.encode()) for turn in turns) + around

    async def _count(self, prompt: dict[str, object]) -> int:
        """Count the prompt's tokens by answering it with one; the answer itself then finds them in the cache.

        There is no other way: the daemon has no call that tokenises.
        """
        context = self.facts.context_length
        count = await self._evaluated(prompt, num_keep=_NUM_KEEP)
        if abs(count - context // 2) > 4 * _NUM_KEEP:
            return count
        # About as many as a daemon that does not know "truncate" leaves of a prompt it cuts: half the context. It keeps
        # another number when told to keep more of the beginning.
        again = await self._evaluated(prompt, num_keep=3 * _NUM_KEEP)
        return count if again == count else context

    async def _evaluated(self, prompt: dict[str, object], *, num_keep: int) -> int:
        chunk = await self._whole(prompt, num_keep=num_keep)
        if not chunk.done:
            raise _unfinished()
        return chunk.prompt_eval_count

    async def _whole(self, prompt: dict[str, object], *, num_keep: int) -> wire.Chunk:
        sampling = SamplingParams(temperature=0, seed=0)
        body = self._body(prompt, sampling, 1, num_keep=num_keep, stream=False)

        async def asked() -> wire.Chunk:
            return self._read(await self._client.whole(self._path(prompt), body))

        return await self._recovering(asked)

    def _body(
        self, prompt: dict[str, object], sampling: SamplingParams, limit: int, *, num_keep: int, stream: bool
    ) -> dict[str, object]:
        facts = self.facts
        own_stops = facts.stops if "messages" in prompt else ()
        body: dict[str, object] = {
            "model": facts.name,
            **prompt,
            "stream": stream,
            "truncate": False,
            "options": {
                **facts.launch,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "min_p": sampling.min_p,
                "typical_p": 1.0,
                "repeat_penalty": sampling.repeat_penalty,
                "repeat_last_n": PENALTY_WINDOW,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "seed": engine_seed(sampling.seed),
                "stop": list(dict.fromkeys((*sampling.stop, *own_stops))),
                "num_predict": limit,
                "num_keep": num_keep,
            },
        }
        return body if facts.keep_alive is None else {**body, "keep_alive": facts.keep_alive}

    @staticmethod
    def _path(prompt: dict[str, object]) -> str:
        return "/api/chat" if "messages" in prompt else "/api/generate"

    # ---- what comes ----------------------------------------------------------------------------

    async def _recovering(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await patient(call)
        except Fault as fault:
            if self._pieces or not fault.crash:
                raise
        return await patient(call)  # the daemon starts the model's process anew by itself

    async def _stream(self, prompt: dict[str, object], limit: int) -> Finished:
        body = self._body(prompt, self._request.sampling, limit, num_keep=_NUM_KEEP, stream=True)
        async with contextlib.aclosing(self._client.lines(self._path(prompt), body)) as lines:
            async for line in lines:
                chunk = self._read(line)
                if chunk.text or chunk.thought:
                    self._pieces += 1
                if chunk.thought:
                    self._report(ReasoningDelta(text=chunk.thought))
                if chunk.text:
                    self._report(TextDelta(text=chunk.text))
                if chunk.done:
                    # Read to the end of the body, which comes with this line: the connection can be used again then.
                    with contextlib.suppress(asyncio.TimeoutError, StopAsyncIteration, Fault):
                        await asyncio.wait_for(anext(lines), _BODY_END_S)
                    return _finished(chunk, limit)
        raise _unfinished()

    def _read(self, line: bytes) -> wire.Chunk:
        try:
            chunk = wire.decode(line, wire.Chunk)
        except ValueError as error:
            raise GenerationFailed(f"Ollama sent an invalid line: {error}") from error
        if chunk.error is not None:
            raise told(chunk.error, status=_OK)
        return chunk


def _finished(chunk: wire.Chunk, limit: int) -> Finished:
    reason: FinishReason
    match chunk.done_reason:
        case "stop" | "length" as told_reason:
            reason = told_reason
        case None | "":  # a daemon from before 2024
            reason = "length" if chunk.eval_count >= limit else "stop"
        case other:
            raise GenerationFailed(f"Ollama ended the answer with {other!r}")
    seconds, decoded = chunk.eval_duration / _NANOSECONDS, chunk.eval_count - 1  # it begins with the first token
    return Finished(
        finish_reason=reason,
        usage=Usage(prompt_tokens=chunk.prompt_eval_count, completion_tokens=chunk.eval_count),
        timings=Timings(decode_tokens_per_s=decoded / seconds if decoded > 0 and seconds > 0 else None),
    )


def _unfinished() -> GenerationFailed:
    return GenerationFailed(
        "Ollama ended the answer without its last message",
        hint="it does so after one token came 30 times in a row: raise temperature or repeat_penalty",
    )


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.text}
