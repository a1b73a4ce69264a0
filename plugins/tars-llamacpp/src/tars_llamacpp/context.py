"""llama.cpp's model and context, as far as the loop uses them, and the batch it hands over."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import llama_cpp

_INT32_BYTES = 4


class Row(NamedTuple):
    """One token to decode."""

    token: int
    position: int
    sequence: int
    wants_logits: bool


class Context:
    """A loaded model with its key-value cache, shared by all sequences."""

    def __init__(self, model: int, context: int) -> None:
        self._model = model
        self._memory = llama_cpp.llama_get_memory(context)
        self._batch = _Batch(llama_cpp.llama_n_batch(context))
        self.native = context
        self.vocab = llama_cpp.llama_model_get_vocab(model)

    @property
    def continues_text(self) -> bool:
        """Whether this is a model for that: one that embeds has no memory, one that translates an encoder."""
        return bool(self._memory) and not llama_cpp.llama_model_has_encoder(self._model)

    def decode(self, rows: Sequence[Row]) -> int:
        """Compute ``rows``; return llama.cpp's code, 0 where all went well."""
        self._batch.fill(rows)
        code: int = llama_cpp.llama_decode(self.native, self._batch.native)
        return code

    def drop(self, sequence: int, start: int = 0) -> bool:
        """Forget ``sequence`` from the position ``start`` on; ``False`` where the model cannot forget a part."""
        return bool(llama_cpp.llama_memory_seq_rm(self._memory, sequence, start, -1))

    def share(self, source: int, target: int, end: int) -> None:
        """Let ``target`` have what ``source`` holds before the position ``end``; nothing is copied."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, 0, end)

    def clear(self) -> None:
        """Forget everything."""
        llama_cpp.llama_memory_clear(self._memory, True)  # noqa: FBT003 - positional in C: the data, too

    def close(self) -> None:
        """Free all memory. The context must not be used afterwards."""
        llama_cpp.llama_free(self.native)
        llama_cpp.llama_model_free(self._model)


class _Batch:
    """A ``llama_batch`` over arrays of its own.

    Filled by slices of ctypes arrays: 5 µs for 16 rows, 28 for 80, as fast as numpy (8 and 26); element by
    element it is four times slower.
    """

    def __init__(self, size: int) -> None:
        self._tokens = (ctypes.c_int32 * size)()
        self._positions = (ctypes.c_int32 * size)()
        self._sequences = (ctypes.c_int32 * size)()
        self._wants_logits = (ctypes.c_int8 * size)()
        self._ones = (ctypes.c_int32 * size)(*[1] * size)
        pointer = ctypes.POINTER(ctypes.c_int32)
        first = ctypes.addressof(self._sequences)
        # Every row names a list of sequences; here each list is one element of the array.
        self._lists = (pointer * size)(*(ctypes.cast(first + _INT32_BYTES * i, pointer) for i in range(size)))
        self.native = llama_cpp.llama_batch(
            n_tokens=0,
            token=self._tokens,
            embd=None,
            pos=self._positions,
            n_seq_id=self._ones,
            seq_id=self._lists,
            logits=self._wants_logits,
        )

    def fill(self, rows: Sequence[Row]) -> None:
        size = len(rows)
        self._tokens[:size] = [row.token for row in rows]
        self._positions[:size] = [row.position for row in rows]
        self._sequences[:size] = [row.sequence for row in rows]
        self._wants_logits[:size] = [row.wants_logits for row in rows]
        self.native.n_tokens = size
