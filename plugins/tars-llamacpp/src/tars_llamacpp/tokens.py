"""From text to tokens and from tokens to bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property

import llama_cpp

from tars_core.plugin import ContextLengthExceeded, Utf8Assembler, least_tokens

_LONGEST_PIECE = 256


class Vocabulary:
    """A model's vocabulary. Any thread may tokenise; what turns tokens into text is the loop's own."""

    def __init__(self, vocab: int) -> None:
        self.native = vocab
        self._pieces: dict[int, bytes] = {}
        self._buffer = ctypes.create_string_buffer(_LONGEST_PIECE)
        self.size: int = llama_cpp.llama_vocab_n_tokens(vocab)
        self._longest = max(map(self._size, range(self.size)), default=0) or 1

    def prompt(self, text: str, context_length: int) -> list[int]:
        """Return the tokens of ``text``. Raises ``ContextLengthExceeded`` where no room is left for an answer.

        A text beyond 1 MiB is refused by the least number of tokens it can have, where that is too many: llama.cpp
        takes 8 s and 1.2 GB for 32 MiB.
        """
        data = text.encode()
        count = least_tokens(text, self._longest)
        if count < context_length:
            tokens, count = self._tokens(data, context_length)
        if count >= context_length:
            raise ContextLengthExceeded(prompt_tokens=count, context_length=context_length)
        return tokens[:count]

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``, however many."""
        data = text.encode()
        _, count = self._tokens(data, 0)
        tokens, count = self._tokens(data, count)
        return tokens[:count]

    def _tokens(self, data: bytes, room: int) -> tuple[ctypes.Array[ctypes.c_int32], int]:
        """Return the tokens and how many there are, special tokens recognised, BOS and EOS where the model wants them.

        There are none where ``room`` is too small. The other threads run meanwhile: ctypes releases the GIL.
        """
        tokens = (ctypes.c_int32 * room)()
        count = llama_cpp.llama_tokenize(self.native, data, len(data), tokens, room, True, True)  # noqa: FBT003 - C
        return tokens, abs(count)

    def _size(self, token: int) -> int:
        """Return how many bytes a token stands for: 0.6 µs, without room to write them to."""
        size: int = llama_cpp.llama_token_to_piece(self.native, token, None, 0, 0, True)  # noqa: FBT003 - C
        return -size

    def decoder(self) -> Callable[[int], str]:
        """Return what turns one answer's tokens, in order, into text made of whole characters."""
        utf8 = Utf8Assembler()
        return lambda token: utf8.push(self.piece(token))

    def piece(self, token: int) -> bytes:
        """Return the bytes of ``token``; none for a control token."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._render(token)
        return piece

    def _render(self, token: int) -> bytes:
        def render() -> int:
            size: int = llama_cpp.llama_token_to_piece(
                self.native,
                token,
                self._buffer,
                len(self._buffer),
                0,
                False,  # noqa: FBT003 - C
            )
            return size

        size = render()
        if size < 0:
            self._buffer = ctypes.create_string_buffer(-size)
            size = render()
        return self._buffer.raw[:size]

    def ends(self, token: int) -> bool:
        """Say whether ``token`` ends the generation."""
        return bool(llama_cpp.llama_vocab_is_eog(self.native, token))

    @cached_property
    def never(self) -> tuple[int, ...]:
        """Tokens that the model's file says are never to be sampled."""
        count = ctypes.c_int32(0)
        tokens = llama_cpp.llama_vocab_get_suppress_tokens(self.native, ctypes.byref(count))
        return tuple(tokens[: count.value]) if count.value else ()
