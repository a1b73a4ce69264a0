"""Loading: from a file and options to a model that runs, or to the reason why not."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import llama_cpp

from tars_core.plugin import (
    DEFAULT_CONTEXT,
    SMALLEST_CONTEXT,
    CancelFlag,
    LoadFailed,
    LoadOptions,
    OutOfMemory,
    ProgressCallback,
    fitting_context,
    is_out_of_memory,
    read_gguf_header,
)
from tars_llamacpp import log
from tars_llamacpp.context import Context, Row
from tars_llamacpp.loop import LoopedModel

_PIECE = 64
"""Tokens of the prompts a step reads. Whoever decodes meanwhile, or cancels, waits for them: 0.3 s with a 135M model
on one core. Fewer are slower to read: 64 at a time 191 tokens/s, 128 195, 32 135."""
_PIECE_GPU = 512  # llama.cpp's own default
_PROGRESS_STEP = 0.01
_ALL_LAYERS = -1
_CPU = "cpu"
_GPU = "gpu"
_USED_DEVICE = re.compile(r"using device (\S+)")


def load(path: Path, options: LoadOptions, progress: ProgressCallback, cancel: CancelFlag) -> LoopedModel:
    """Load ``path``. Raises ``LoadFailed`` with llama.cpp's own words, or ``OutOfMemory``."""
    header = read_gguf_header(path)
    slots = min(options.concurrency, llama_cpp.llama_max_parallel_sequences())
    wanted = options.context_length or min(header.context_length, DEFAULT_CONTEXT)
    fitting = fitting_context(header, wanted, slots)
    log.listen()
    llama_cpp.llama_backend_init()
    layers = _gpu_layers(options)
    piece = _PIECE_GPU if layers else _PIECE
    model = _load_weights(path, layers, progress, cancel)
    params = llama_cpp.llama_context_default_params()
    params.n_batch = params.n_ubatch = piece + slots
    params.n_seq_max = params.n_outputs_max = slots
    params.n_threads = params.n_threads_batch = options.cpu_threads
    params.kv_unified = True  # else sharing a part of a sequence aborts the process
    try:
        context, context_length = _new_context(path, model, params, fitting)
    except LoadFailed:
        llama_cpp.llama_model_free(model)
        raise
    return LoopedModel(
        context,
        header,
        device=_used_device() if layers else _CPU,
        context_length=context_length,
        context_shrunk=context_length < wanted,
        slots=slots,
        piece=piece,
        divisible=_warm_up(context, path),
    )


def _gpu_layers(options: LoadOptions) -> int:
    if options.device == _CPU or not llama_cpp.llama_supports_gpu_offload():
        return 0
    return _ALL_LAYERS if options.gpu_layers is None else options.gpu_layers


def _load_weights(path: Path, layers: int, progress: ProgressCallback, cancel: CancelFlag) -> int:
    told = 0.0

    def on_progress(fraction: float, _user_data: object) -> bool:
        nonlocal told
        if fraction - told >= _PROGRESS_STEP:
            told = fraction
            progress(fraction, f"loading {path.name}")
        return not cancel.is_set()

    params = llama_cpp.llama_model_default_params()
    params.n_gpu_layers = layers
    params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    params.progress_callback = llama_cpp.llama_progress_callback(on_progress)
    no_devices = (ctypes.c_void_p * 1)(None)
    if not layers:
        # Else a GPU build uses the GPU for long batches all the same.
        params.devices = ctypes.addressof(no_devices)
    progress(0.0, f"loading {path.name}")
    model: int | None = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
    if cancel.is_set():
        if model:
            llama_cpp.llama_model_free(model)
        raise LoadFailed(f"loading {path.name} was cancelled")
    if not model:
        raise _failure(path)
    return model


def _new_context(path: Path, model: int, params: llama_cpp.llama_context_params, length: int) -> tuple[Context, int]:
    """Make room for ``length`` tokens a sequence, or for half of it as often as memory demands; return how many."""
    while True:
        params.n_ctx = length * params.n_seq_max
        context: int | None = llama_cpp.llama_init_from_model(model, params)
        if context:
            return Context(model, context), length
        failure = _failure(path)
        if not isinstance(failure, OutOfMemory) or length <= SMALLEST_CONTEXT:
            raise failure
        length //= 2


def _warm_up(context: Context, path: Path) -> bool:
    """Decode for the first time; say whether a part of a sequence can be forgotten. Recurrent models cannot do it."""
    if not context.continues_text:
        context.close()
        raise LoadFailed(f"{path.name} is not a causal language model", hint="embedding models cannot generate text")
    code = context.decode([Row(0, 0, 0, wants_logits=False), Row(0, 1, 0, wants_logits=True)])
    if code != 0:
        context.close()
        raise _failure(path)
    divisible = context.drop(0, 1)
    context.clear()
    return divisible


def _used_device() -> str:
    """Return the first GPU that llama.cpp says it uses, such as ``cuda0``; its Python API has no way to ask."""
    used = (_USED_DEVICE.search(line) for line in log.lines())
    return next((match[1].lower() for match in used if match), _GPU)


def _failure(path: Path) -> LoadFailed:
    errors = log.errors()
    reason = errors[0] if errors else "no reason given"
    if any(map(is_out_of_memory, errors)):
        return OutOfMemory(
            f"{path.name} does not fit the memory: {reason}", hint="use a smaller model, context or concurrency"
        )
    return LoadFailed(f"llama.cpp cannot load {path.name}: {reason}")
