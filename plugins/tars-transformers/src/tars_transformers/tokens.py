"""From text to tokens and from tokens to bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import tokenizers
import tokenizers.decoders

from tars_core.plugin import Utf8Assembler

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """A model's tokenizer, without what it would do unasked: cut, pad, or end the text."""

    def __init__(self, native: tokenizers.Tokenizer) -> None:
        self._native = native
        native.no_truncation()
        native.no_padding()
        plain, framed = (native.encode("a", add_special_tokens=special).ids for special in (False, True))
        # What it puts in front of a text belongs to the prompt; what it puts behind would end it.
        self.prefix: list[int] = framed[: _find(framed, plain)]
        added = native.get_added_tokens_decoder()
        self.special = {text.content: token for token, text in added.items() if text.special}
        self._added = {token: b"" if text.special else text.content.encode() for token, text in added.items()}
        self._to_bytes = _byte_decoder(native)
        self.longest: int = max((len(text.encode()) for text in native.get_vocab()), default=1)

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of ``text``, special tokens recognised.

        In a batch of one: ``encode`` holds the GIL, for 0.5 s with a megabyte, and takes twice as long.
        """
        (encoded,) = self._native.encode_batch_fast([text], add_special_tokens=False)
        return [*self.prefix, *encoded.ids]

    def decoder(self) -> Callable[[int], str]:
        """Return a function that gives the text which each next token of an answer completes."""
        if self._to_bytes is None:
            stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
            return lambda token: stream.step(self._native, token) or ""
        utf8 = Utf8Assembler()
        return lambda token: utf8.push(self.piece(token))

    def piece(self, token: int) -> bytes:
        """Return the bytes of ``token``; none for a special one, or one the model has and the tokenizer has not."""
        if token in self._added:
            return self._added[token]
        text = self._native.id_to_token(token)
        return self._to_bytes(text) if text is not None and self._to_bytes is not None else b""


def _find(tokens: list[int], part: list[int]) -> int:
    """Return where ``part`` begins in ``tokens``."""
    return next((at for at in range(len(tokens)) if tokens[at : at + len(part)] == part), 0)


def _byte_decoder(native: tokenizers.Tokenizer) -> Callable[[str], bytes] | None:
    """Return what turns a token's name into bytes; ``None`` where single tokens have none of their own.

    The two families of nearly all language models are known: byte-level BPE, and SentencePiece with bytes for what is
    not in its vocabulary. What those would strip at the beginning of a text is kept: an answer is no beginning.
    """
    state = json.loads(native.decoder.__getstate__()) if native.decoder is not None else {}
    steps: list[Mapping[str, Any]] = state.get("decoders", [state])
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        return _from_byte_level
    if "ByteFallback" not in kinds or not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return None
    replaced = [
        (str(step["pattern"]["String"]), str(step["content"]))
        for step in steps
        if step["type"] == "Replace" and "String" in step["pattern"]
    ]
    replaced += [(str(step["replacement"]), " ") for step in steps if step["type"] == "Metaspace"]

    def decode(text: str) -> bytes:
        if byte := _BYTE.fullmatch(text):
            return bytes([int(byte[1], 16)])
        for old, new in replaced:
            text = text.replace(old, new)
        return text.encode()

    return decode


def _byte_level_alphabet() -> dict[str, int]:
    """Return the characters that stand for bytes: printable ones for themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _from_byte_level(text: str) -> bytes:
    return bytes(_ALPHABET[c] for c in text) if all(c in _ALPHABET for c in text) else text.encode()
