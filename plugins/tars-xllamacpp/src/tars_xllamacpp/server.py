"""llama.cpp's server engine in this process, driven through its completion call.

The engine batches all running requests in a loop of its own. Each of its calls blocks a thread and reports through
a callback; what the callbacks bring is gathered and handed on step by step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import xllamacpp

from tars_core.plugin import (
    DEFAULT_CONTEXT,
    PENALTY_WINDOW,
    BackendEvent,
    ContextLengthExceeded,
    Finished,
    FinishReason,
    GenerateRequest,
    GenerationFailed,
    GGUFHeader,
    LoadedModel,
    LoadFailed,
    LoadOptions,
    OutOfMemory,
    Progress,
    Report,
    Reports,
    TextDelta,
    Timings,
    Usage,
    engine_seed,
    fitting_context,
    is_out_of_memory,
    read_gguf_header,
)
from tars_xllamacpp.plugin import FEATURES
from tars_xllamacpp.settings import XLlamaCppSettings

_CONTEXT_STEP = 256  # llama.cpp pads its cache to this many tokens
_CPU = "cpu"
_SAMPLERS = ["penalties", "top_k", "top_p", "min_p", "temperature"]  # llama.cpp's own order, without the rest


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Timings(msgspec.Struct):
    predicted_n: int = 0
    predicted_ms: float = 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first, by the time they took."""
        return (self.predicted_n - 1) / self.predicted_ms * 1000 if self.predicted_n > 1 and self.predicted_ms else None


class _Choice(msgspec.Struct):
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None


class _Verbose(msgspec.Struct):
    tokens: list[int] = []
    tokens_evaluated: int = 0
    tokens_predicted: int = 0


class _Progress(msgspec.Struct):
    processed: int = 0


class _Error(msgspec.Struct):
    message: str = ""
    type: str = ""
    n_prompt_tokens: int = 0
    n_ctx: int = 0


class _Chunk(msgspec.Struct):
    """What the engine reports, as far as it is used here."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    timings: _Timings | None = None
    prompt_progress: _Progress | None = None
    verbose: _Verbose | None = msgspec.field(default=None, name="__verbose")
    error: _Error | None = None


class ServedModel(LoadedModel):
    """A model in the engine. Implements the batched form of the contract."""

    def __init__(self, server: xllamacpp.Server, header: GGUFHeader, *, slots: int, context: int, shrunk: bool) -> None:
        super().__init__(
            device=_device(),
            context_length=context,
            concurrency=slots,
            features=FEATURES,
            header=header,
            context_shrunk=shrunk,
        )
        self._server = server
        self._reports = Reports()
        self._cancelled: dict[int, threading.Event] = {}

    @classmethod
    def load(cls, path: Path, options: LoadOptions) -> ServedModel:
        """Start the engine on ``path``. Raises ``LoadFailed`` with the engine's own words, or ``OutOfMemory``."""
        header = read_gguf_header(path)
        # The engine cuts a slot to what the model was trained for, and rounds it up to whole steps.
        wanted = min(options.context_length or DEFAULT_CONTEXT, header.context_length)
        fitting = fitting_context(header, wanted, options.concurrency)
        context = min(-(-fitting // _CONTEXT_STEP) * _CONTEXT_STEP, header.context_length)
        with tempfile.TemporaryDirectory(prefix="tars-") as folder, _stderr_kept() as words:
            params = _params(path, options, context=context, socket=Path(folder) / "engine.sock")
            try:
                server = xllamacpp.Server(params)
            except (RuntimeError, ValueError) as error:
                raise _load_error(path, error, words()) from error
        return cls(server, header, slots=options.concurrency, context=context, shrunk=fitting < wanted)

    def prepare(self, request: GenerateRequest) -> bytes:
        """Write what the engine is asked, which tokenises it without the GIL.

        As JSON: a dict with a prompt of 32 Mi characters holds the GIL for 73 ms at a time, this for 20.
        """
        return msgspec.json.encode(_body(request))

    def submit(self, request_id: int, prepared: bytes) -> None:
        """Start a thread that blocks in the engine's call."""
        cancelled = self._cancelled[request_id] = threading.Event()
        threading.Thread(target=self._run, args=(request_id, prepared, cancelled), daemon=True).start()

    def step(self) -> Sequence[Report]:
        """Return what the callbacks brought since the last step."""
        reported = self._reports.fetch()
        for request_id, event in reported:
            if isinstance(event, Finished | Exception):
                self._cancelled.pop(request_id, None)
        return reported

    def cancel(self, request_id: int) -> None:
        """Let the callback of the request say that it has seen enough."""
        if (flag := self._cancelled.get(request_id)) is not None:
            flag.set()

    def _run(self, request_id: int, body: bytes, cancelled: threading.Event) -> None:
        call = _Call(body, cancelled, lambda event: self._reports.put(request_id, event))
        self._reports.put(request_id, call.run(self._server))


class _Call:
    """One call of the engine, and what its callback has seen."""

    def __init__(self, body: bytes, cancelled: threading.Event, report: Callable[[BackendEvent], None]) -> None:
        self._body = body
        self._cancelled = cancelled
        self._report = report
        self._error: Exception | None = None
        self._finish_reason: FinishReason | None = None
        self._usage = Usage(prompt_tokens=0, completion_tokens=0)
        self._tokens_per_s: float | None = None
        self._tokens: list[int] = []  # whose text is held back: it may be the beginning of a stop string
        self._told = 0  # tokens whose text is out

    def run(self, server: xllamacpp.Server) -> Finished | Exception:
        """Block until the engine is done; return the terminal event, or the error."""
        try:
            server.handle_completions(self._body, self._callback)
        except Exception as error:  # noqa: BLE001 - the engine raises RuntimeError, ValueError and more
            self._error = self._error or GenerationFailed(f"llama.cpp: {error}")
        if self._error is not None:
            return self._error
        reason = self._finish_reason
        if reason is None and self._cancelled.is_set():
            reason = "cancelled"
        if reason is None:
            return GenerationFailed("llama.cpp ended the answer without a reason")
        return Finished(
            finish_reason=reason, usage=self._usage, timings=Timings(decode_tokens_per_s=self._tokens_per_s)
        )

    def _callback(self, chunk: bytes) -> bool:
        # An exception that leaves this call ends the answer silently, sys.exit crashes the process: keep it here.
        try:
            self._take(msgspec.json.decode(chunk, type=_Chunk))
        except BaseException as error:  # noqa: BLE001 - handed to the caller of run()
            self._error = GenerationFailed(f"llama.cpp sent something unexpected: {error}")
        return self._error is not None or self._cancelled.is_set()

    def _take(self, chunk: _Chunk) -> None:
        if chunk.error is not None:
            self._error = _request_error(chunk.error)
            return
        if chunk.timings is not None:
            self._tokens_per_s = chunk.timings.tokens_per_s
        if chunk.usage is not None:
            self._usage = Usage(
                prompt_tokens=chunk.usage.prompt_tokens, completion_tokens=chunk.usage.completion_tokens
            )
        elif chunk.verbose is not None:
            self._usage = Usage(
                prompt_tokens=chunk.verbose.tokens_evaluated, completion_tokens=chunk.verbose.tokens_predicted
            )
        if chunk.prompt_progress is not None:
            self._report(Progress(prompt_tokens_done=chunk.prompt_progress.processed))
            return
        if chunk.verbose is not None:
            self._tokens += chunk.verbose.tokens
        for choice in chunk.choices:
            if choice.text:
                # Of a character of several tokens the engine names only the last: then none is told.
                complete = self._told + len(self._tokens) == self._usage.completion_tokens
                self._report(TextDelta(text=choice.text, token_ids=tuple(self._tokens) if complete else ()))
                self._told, self._tokens = self._usage.completion_tokens, []
            self._finish_reason = choice.finish_reason or self._finish_reason


def _body(request: GenerateRequest) -> dict[str, object]:
    sampling = request.sampling
    return {
        "prompt": request.prompt,
        "stream": True,
        "return_progress": True,
        "verbose": True,  # brings the token ids
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repeat_penalty": sampling.repeat_penalty,
        "repeat_last_n": PENALTY_WINDOW,
        "samplers": _SAMPLERS,
        "seed": engine_seed(sampling.seed),
        "stop": sampling.stop,
    }


def _request_error(error: _Error) -> Exception:
    if error.type == "exceed_context_size_error":
        return ContextLengthExceeded(prompt_tokens=error.n_prompt_tokens, context_length=error.n_ctx)
    return GenerationFailed(f"llama.cpp refused the request: {error.message}")


def _params(path: Path, options: LoadOptions, *, context: int, socket: Path) -> xllamacpp.CommonParams:
    own = XLlamaCppSettings.model_validate_json(options.backend_settings)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel = options.concurrency
    # With one unified pool an overflow kills every running request; so each slot gets its own part.
    params.kv_unified = False
    params.n_ctx = context * options.concurrency
    params.n_batch = params.n_ubatch = own.batch
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.cpu_threads
    params.cache_ram_mib = own.prompt_cache_mib
    params.n_gpu_layers = 0 if options.device == "cpu" else -1 if options.gpu_layers is None else options.gpu_layers
    params.fit_params = False
    params.ctx_shift = False
    params.ui = False
    params.verbosity = 1
    # The engine's HTTP listener cannot be turned off; a socket in a private folder is closed to everybody else.
    params.hostnames = [str(socket)]
    params.n_threads_http = 1
    return params


def _device() -> str:
    names = [d["name"] for d in xllamacpp.get_device_info() if "CPU" not in str(d["type"])]
    return str(names[0]).lower() if names else _CPU


def _load_error(path: Path, error: Exception, words: str) -> LoadFailed:
    """Tell why: the exception says no more than that it failed; the reason went to stderr."""
    reasons = [line.strip() for line in words.splitlines() if "error" in line.lower() or "failed" in line.lower()]
    reason = reasons[0] if reasons else str(error)
    if is_out_of_memory(words):
        return OutOfMemory(f"{path.name} does not fit the memory: {reason}", hint="use a smaller model or context")
    return LoadFailed(f"llama.cpp cannot load {path.name}: {reason}")


@contextlib.contextmanager
def _stderr_kept() -> Iterator[Callable[[], str]]:
    """Keep what native code writes to fd 2; pass it on at the end."""
    sys.stderr.flush()
    real = os.dup(2)
    with tempfile.TemporaryFile() as kept:
        os.dup2(kept.fileno(), 2)

        def words() -> str:
            kept.seek(0)
            return kept.read().decode(errors="replace")

        try:
            yield words
        finally:
            os.dup2(real, 2)
            os.close(real)
            sys.stderr.write(words())
            sys.stderr.flush()
