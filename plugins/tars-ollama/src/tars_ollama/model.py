"""A model in the daemon's memory, in the batched form of the contract: one event loop carries all its requests."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Sequence
from functools import partial

import msgspec

from tars_core.plugin import (
    BASIC_FEATURES,
    CancelFlag,
    ContextLengthExceeded,
    Finished,
    GenerateRequest,
    GenerationFailed,
    LoadedModel,
    LoadFailed,
    LoadOptions,
    ProgressCallback,
    Report,
    Reports,
)
from tars_ollama.address import Address
from tars_ollama.answer import Answer
from tars_ollama.client import Client
from tars_ollama.failures import Fault
from tars_ollama.loading import Facts, Loader, load_body, patient
from tars_ollama.loop import LoopThread
from tars_ollama.probe import OLLAMAS_CHAT
from tars_ollama.settings import OllamaSettings

_STEP_S = 0.05


class OllamaModel(LoadedModel):
    """See :class:`~tars_core.hookspecs.BatchedModel`."""

    def __init__(self, loop: LoopThread, client: Client, facts: Facts, *, slots: int) -> None:
        super().__init__(
            device=facts.device,
            context_length=facts.context_length,
            concurrency=slots,
            features=OLLAMAS_CHAT if facts.renders_chat else BASIC_FEATURES,
            header=facts.header,
            context_shrunk=facts.shrunk,
        )
        self._loop = loop
        self._client = client
        self._facts = facts
        self._growing = asyncio.Lock()
        self._reports = Reports()
        self._running: dict[int, concurrent.futures.Future[Finished]] = {}

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request as it is: the daemon tokenises."""
        return request

    def submit(self, request_id: int, prepared: GenerateRequest) -> None:
        """Send the request."""
        answer = Answer(self._client, self._facts, prepared, lambda event: self._reports.put(request_id, event))
        future = self._running[request_id] = self._loop.start(self._answered(answer, prepared))
        future.add_done_callback(partial(self._ended, request_id, answer))

    def step(self) -> Sequence[Report]:
        """Return what came since the last step."""
        reported = self._reports.fetch()
        for request_id, event in reported:
            if isinstance(event, Finished | Exception):
                self._running.pop(request_id, None)
        return reported

    def cancel(self, request_id: int) -> None:
        """Close the request's connection, which is what stops Ollama."""
        if (future := self._running.get(request_id)) is not None:
            future.cancel()

    def close(self) -> None:
        """Close all connections. The model stays in the daemon's memory as long as its keep-alive says."""
        self._loop.close(self._client.close())

    def _ended(self, request_id: int, answer: Answer, future: concurrent.futures.Future[Finished]) -> None:
        event: Finished | Exception
        if future.cancelled():
            event = answer.cancelled()
        elif (error := future.exception()) is None:
            event = future.result()
        else:
            event = error if isinstance(error, Exception) else GenerationFailed(f"{type(error).__name__}: {error}")
        self._reports.put(request_id, event)

    async def _answered(self, answer: Answer, request: GenerateRequest) -> Finished:
        try:
            return await answer.run()
        except ContextLengthExceeded as error:
            if not await self._grown(error.prompt_tokens, request.sampling.max_tokens):
                raise
        answer.facts = self._facts
        return await answer.run()

    async def _grown(self, prompt_tokens: int, max_tokens: int) -> bool:
        """Load the model anew with room for the prompt, where that is wanted; say whether there is now."""
        async with self._growing:
            facts = self._facts
            if facts.context_length > prompt_tokens:
                return True  # another request has seen to it
            if facts.most_context <= prompt_tokens:
                return False
            # The next power of two, so that growing is rare.
            context = min(facts.most_context, 1 << (prompt_tokens + max_tokens - 1).bit_length())
            launch = {**facts.launch, "num_ctx": context}
            body = load_body(facts.name, launch, facts.keep_alive)
            try:
                await patient(partial(self._client.whole, "/api/generate", body))
            except Fault:
                self.context_shrunk = True  # so another backend is asked; here the old context comes back by itself
                return False
            self._facts = msgspec.structs.replace(facts, launch=launch, context_length=context)
            self.context_length = context
            return True


def load(  # noqa: PLR0913, PLR0917 - what the hook was given, taken apart
    name: str,
    address: Address,
    options: LoadOptions,
    settings: OllamaSettings,
    progress: ProgressCallback,
    cancel: CancelFlag,
) -> OllamaModel:
    """Have the daemon load the model. Raises a ``TarsError``."""
    try:
        client = Client(address)
    except Fault as fault:
        raise fault.to_error(name, loading=True) from fault
    loop = LoopThread()
    try:
        loading = loop.start(Loader(client, name, options, settings, progress, local=address.loopback).run())
        while not concurrent.futures.wait((loading,), timeout=_STEP_S).done:
            if cancel.is_set():
                raise LoadFailed(f"loading {name} was cancelled")
        facts = loading.result()
    except BaseException:
        loop.close(client.close())
        raise
    slots = min(options.concurrency, settings.parallel or 1)
    return OllamaModel(loop, client, facts, slots=slots)
