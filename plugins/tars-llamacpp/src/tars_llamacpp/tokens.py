"""From text to tokens and from tokens to bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cached_property

import llama_cpp

from tars_core.plugin import Utf8Assembler

_LONGEST_PIECE = 256
_SPARE_TOKENS = 16  # BOS, EOS, and the space some vocabularies put in front


class Vocabulary:
    """A model's vocabulary. Any thread may tokenise; what turns tokens into text is the loop's own."""

    def __init__(self, vocab: int) -> None:
        self.native = vocab
        self._pieces: dict[int, bytes] = {}
        self._buffer = ctypes.create_string_buffer(_LONGEST_PIECE)
        self.size: int = llama_cpp.llama_vocab_n_tokens(vocab)
        self.longest: int = max(map(self._size, range(self.size)), default=0) or 1

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``, special tokens recognised, BOS and EOS where the model wants them.

        The other threads run meanwhile: ctypes releases the GIL.
        """
        data = text.encode()
        room = len(data) + _SPARE_TOKENS
        while True:
            tokens = (ctypes.c_int32 * room)()
            count = llama_cpp.llama_tokenize(self.native, data, len(data), tokens, room, True, True)  # noqa: FBT003 - C
            if count >= 0:
                return tokens[:count]
            room = -count

    def _size(self, token: int) -> int:
        """Return how many bytes a token stands for: 0.6 µs, without room to write them to."""
        size: int = llama_cpp.llama_token_to_piece(self.native, token, None, 0, 0, True)  # noqa: FBT003 - C
        return -size

    def decoder(self) -> Callable[[int], str]:
        """Return what turns one answer's tokens, in order, into text made of whole characters."""
        utf8 = Utf8Assembler()
        return lambda token: utf8.push(self.piece(token))

    def piece(self, token: int) -> bytes:
        """Return the bytes of ``token``; none for a control token, or one that ends the generation."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = b"" if self.ends(token) else self._render(token)
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
