"""The header of a GGUF file, read in Python before native code sees the file.

Hostile and damaged files have crashed llama.cpp's own reader, and the ``gguf`` package needs half a minute for a
real vocabulary. This reader skips what nobody asked for, and bounds every number it believes. It reads and never maps
the file: a mapped file that somebody cuts short ends the process, and a cold one is read in pages by the thousand.
Format: the GGUF specification in ggml's documentation, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tars_core.types.errors import LoadFailed
from tars_core.types.public import Public
from tars_core.types.reports import ProbeReport

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARRAY, _STRING = 9, 8
_U64 = struct.Struct("<Q")
_SCALARS = {
    kind: struct.Struct("<" + code)
    for kind, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_MAX_ENTRIES = 2**20
_MAX_TENSORS = 2**20
_MAX_ELEMENTS = 2**28
_MAX_KEY = 2**16
_MAX_TEXT = 2**24
_MAX_DIMENSIONS = 4
_MAX_DEPTH = 4
_MAX_HEADER = 2**28
_STRIDE = 4096
_WINDOW = 2**18
_SAMPLE = 4096

# The texts that are needed, and what becomes of bytes that are not UTF-8: another template would be another prompt.
# The other texts may be in any encoding; llama.cpp does not look at them.
_TEXTS = {
    "general.architecture": "replace",
    "general.name": "replace",
    "tokenizer.ggml.model": "replace",
    "tokenizer.chat_template": "strict",
}

# Elements and bytes of one block, by tensor type (ggml's type table).
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip


class GGUFHeader(Public, frozen=True, kw_only=True):
    """What the loading of a model is decided by."""

    architecture: str
    name: str
    context_length: int
    """Tokens the model was trained for."""
    block_count: int
    embedding_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    """Numbers in one head's key."""
    value_length: int
    chat_template: str | None
    bos_token: str
    eos_token: str
    adds_bos: bool
    longest_token: int
    """Bytes of the longest token's text."""
    tensor_bytes: int
    weights_id: str
    """Digest of the tensors' names, shapes, types and sampled contents."""

    def kv_bytes(self, context_length: int) -> int:
        """Estimate of a 16-bit key-value cache for ``context_length`` tokens, in bytes."""
        per_head = 2 * (self.key_length + self.value_length)
        return per_head * self.head_count_kv * self.block_count * context_length


def is_gguf(path: Path) -> bool:
    """Say whether ``path`` is meant for a reader of GGUF: by its name, or by how the file begins."""
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False  # a folder, or nothing there: no GGUF


def probe(  # noqa: PLR0913 - facts about a backend
    path: Path,
    *,
    device: str,
    overhead_bytes: int,
    preference: int,
    features: frozenset[str] | None = None,
    deviations: tuple[str, ...] = (),
) -> ProbeReport:
    """Report on ``path`` for a backend that runs GGUF files: what its header tells, or why it cannot be run.

    ``overhead_bytes`` are what the backend needs beside the weights; ``preference`` is 0 to 100.
    """
    try:
        header = read_header(path)
    except LoadFailed as error:
        return ProbeReport(available=False, reason=error.message, hint=error.hint)
    except OSError as error:
        return ProbeReport(available=False, reason=f"{path} cannot be read: {error.strerror}")
    return ProbeReport(
        available=True,
        device=device,
        # Of the machine's memory; a GPU has its own, which only the runtime can ask for.
        memory_bytes=header.tensor_bytes + overhead_bytes if device == "cpu" else None,
        weights_id=header.weights_id,
        context_length=header.context_length,
        features=features,
        deviations=deviations,
        preference=preference,
    )


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of ``path``.

    Raises :class:`~tars_core.types.errors.LoadFailed` where the file is not a GGUF file, is cut short (also while it
    is read), or states what no valid file states; ``OSError`` where it cannot be read.
    """
    with path.open("rb", buffering=_SAMPLE) as file:  # a larger buffer would be filled for each sample
        return _Reader(file, path).header()


def _damaged(path: Path, why: str) -> LoadFailed:
    return LoadFailed(f"{path.name} is not a valid GGUF file: {why}", hint="copy or download the file again")


def _known(values: dict[str, object], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) else None


class _Strings(NamedTuple):
    """An array of strings that was skipped: how many, where every 4,096th begins, and the bytes of the longest."""

    size: int = 0
    places: list[int] = []  # noqa: RUF012 - never changed
    longest: int = 0


class _Reader:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._path = path
        self._at = 0
        self._window = b""  # the part of the file that was read last, and where it begins
        self._begin = 0

    def header(self) -> GGUFHeader:
        if self._size < 24:  # noqa: PLR2004 - magic, version and two counts
            raise _damaged(self._path, "it is shorter than a GGUF header")
        magic = self._take(len(_MAGIC))
        if magic != _MAGIC:
            raise _damaged(self._path, f"it begins with {magic!r}")
        version = self._u32()
        if version not in _VERSIONS:
            raise _damaged(self._path, f"version {version} is unknown")
        tensors, entries = self._bounded("tensors", _MAX_TENSORS), self._bounded("entries", _MAX_ENTRIES)
        values, tokens = self._entries(entries)
        infos = list(self._tensor_infos(tensors))
        alignment = self._whole(values, "general.alignment", 32)
        if alignment <= 0 or alignment & (alignment - 1):
            raise _damaged(self._path, f"its alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        for name, offset, size, _ in infos:
            self._check_place(name, offset, start + offset + size, alignment)
        architecture = _known(values, "general.architecture") or ""
        if not architecture or not infos:
            raise _damaged(self._path, "it names no architecture or holds no tensors")
        heads = self._whole(values, f"{architecture}.attention.head_count", 1)
        embedding = self._whole(values, f"{architecture}.embedding_length", 1)
        per_head = embedding // max(1, heads)
        return GGUFHeader(
            architecture=architecture,
            name=_known(values, "general.name") or self._path.stem,
            context_length=self._whole(values, f"{architecture}.context_length", 2048),
            block_count=self._whole(values, f"{architecture}.block_count", 1),
            embedding_length=embedding,
            head_count=heads,
            head_count_kv=self._whole(values, f"{architecture}.attention.head_count_kv", heads),
            key_length=self._whole(values, f"{architecture}.attention.key_length", per_head),
            value_length=self._whole(values, f"{architecture}.attention.value_length", per_head),
            chat_template=_known(values, "tokenizer.chat_template"),
            bos_token=self._token(tokens, values.get("tokenizer.ggml.bos_token_id")),
            eos_token=self._token(tokens, values.get("tokenizer.ggml.eos_token_id")),
            adds_bos=self._adds_bos(values),
            longest_token=tokens.longest,
            tensor_bytes=sum(size for _, _, size, _ in infos),
            weights_id=self._weights_id(start, infos),
        )

    def _entries(self, count: int) -> tuple[dict[str, object], _Strings]:
        """Read numbers and the texts that are needed; find the vocabulary, and skip everything else."""
        values: dict[str, object] = {}
        tokens = _Strings()
        for _ in range(count):
            key = self._text(_MAX_KEY)
            kind = self._u32()
            if kind == _ARRAY:
                strings = self._skip_array()
                tokens = strings if key == "tokenizer.ggml.tokens" else tokens
            elif kind != _STRING:
                values[key] = self._scalar(kind)
            elif key in _TEXTS:
                values[key] = self._text(_MAX_TEXT, _TEXTS[key])
            else:
                self._skip_strings(1)
        return values, tokens

    def _check_place(self, name: str, offset: int, end: int, alignment: int) -> None:
        if offset % alignment:
            raise _damaged(self._path, f"tensor {name} begins at {offset}, its alignment is {alignment}")
        if end > self._size:
            raise _damaged(self._path, f"tensor {name} ends {end - self._size} bytes past the end of the file")

    def _adds_bos(self, values: dict[str, object]) -> bool:
        stated = values.get("tokenizer.ggml.add_bos_token")
        # llama.cpp's default: only the SentencePiece vocabulary ("llama") adds one unasked.
        return stated if isinstance(stated, bool) else values.get("tokenizer.ggml.model") == "llama"

    def _whole(self, values: dict[str, object], key: str, default: int) -> int:
        value = values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            return default
        if not 0 <= value <= _MAX_ELEMENTS:
            raise _damaged(self._path, f"{key} is {value}")
        return value

    def _token(self, tokens: _Strings, index: object) -> str:
        """Return the text of a token of the vocabulary, which was skipped before."""
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < tokens.size:
            return ""
        self._at = tokens.places[index // _STRIDE]
        self._skip_strings(index % _STRIDE)
        return self._text(_MAX_KEY)

    def _tensor_infos(self, count: int) -> Iterator[tuple[str, int, int, bytes]]:
        for _ in range(count):
            begin = self._at
            name = self._text(_MAX_KEY)
            dimensions = self._u32()
            if not 0 < dimensions <= _MAX_DIMENSIONS:
                raise _damaged(self._path, f"tensor {name} has {dimensions} dimensions")
            shape = [self._u64() for _ in range(dimensions)]
            kind = self._u32()
            described = self._bytes(begin, self._at - begin)
            offset = self._u64()
            elements = 1
            for size in shape:
                elements *= size
            if elements <= 0 or elements > 2**48:
                raise _damaged(self._path, f"tensor {name} has {elements} elements")
            if kind not in _BLOCKS:
                raise _damaged(self._path, f"tensor {name} is of the unknown type {kind}")
            per_block, size = _BLOCKS[kind]
            if shape[0] % per_block:
                raise _damaged(self._path, f"a row of tensor {name} is not a whole number of blocks")
            yield name, offset, elements // per_block * size, described

    def _scalar(self, kind: int) -> object:
        if kind not in _SCALARS:
            raise _damaged(self._path, f"a value has the unknown type {kind}")
        form = _SCALARS[kind]
        value: object = form.unpack(self._take(form.size))[0]
        return value

    def _skip_array(self, depth: int = 0) -> _Strings:
        if depth >= _MAX_DEPTH:
            raise _damaged(self._path, "arrays are nested too deep")
        kind = self._u32()
        count = self._bounded("elements", _MAX_ELEMENTS)
        if kind == _STRING:
            return self._skip_strings(count)
        if kind == _ARRAY:
            for _ in range(count):
                self._skip_array(depth + 1)
        elif kind in _SCALARS:
            self._at += count * _SCALARS[kind].size
        else:
            raise _damaged(self._path, f"an array has the unknown type {kind}")
        return _Strings()

    def _skip_strings(self, count: int) -> _Strings:
        places = []
        longest = 0
        for left in range(count, 0, -_STRIDE):
            places.append(self._at)
            longest = max(longest, self._skip_few(min(left, _STRIDE)))
        return _Strings(count, places, longest)

    def _skip_few(self, count: int) -> int:
        # The hot loop: a vocabulary has 150,000 tokens and as many merges. The end of the window is a struct.error.
        longest = 0
        while count:
            self._bytes(self._at, _U64.size)
            at, data, unpack = self._at - self._begin, self._window, _U64.unpack_from
            done = 0
            try:
                for done in range(count):  # noqa: B007 - needed where the loop breaks off
                    size = unpack(data, at)[0]
                    at += 8 + size
                    if size > longest:  # noqa: PLR1730 - max() takes three times as long
                        longest = size
                count = 0
            except (struct.error, OverflowError):
                count -= done
            self._at = self._begin + at
        return longest

    def _text(self, limit: int, errors: str = "replace") -> str:
        size = self._u64()
        if size > limit:
            raise _damaged(self._path, f"a text of {size} bytes")
        try:
            return self._take(size).decode(errors=errors)
        except UnicodeDecodeError:
            raise _damaged(self._path, "its chat template is not valid UTF-8") from None

    def _bounded(self, what: str, limit: int) -> int:
        count = self._u64()
        if count > limit:
            raise _damaged(self._path, f"it claims {count} {what}")
        return count

    def _u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _take(self, size: int) -> bytes:
        taken = self._bytes(self._at, size)
        self._at += size
        return taken

    def _bytes(self, at: int, size: int) -> bytes:
        """Return a part of the header, and move the window there where it does not hold it."""
        index = at - self._begin
        if not 0 <= index <= len(self._window) - size:
            self._window, self._begin, index = self._read(at, size, _WINDOW), at, 0
            if at + size > _MAX_HEADER:
                raise _damaged(self._path, f"its header is longer than {_MAX_HEADER} bytes")
        return self._window[index : index + size]

    def _read(self, at: int, size: int, wanted: int = 0) -> bytes:
        """Read at least ``size`` bytes, and up to ``wanted`` where the file has them."""
        if at + size <= self._size:
            self._file.seek(at)
            data = self._file.read(max(size, wanted))
            if len(data) >= size:  # else the file was cut short after it was opened
                return data
        raise _damaged(self._path, f"it is cut short: it should have at least {at + size} bytes")

    def _weights_id(self, start: int, infos: list[tuple[str, int, int, bytes]]) -> str:
        """Digest names, shapes, types, and 8 KiB of each tensor.

        Whole files take minutes, and weights that differ at all differ nearly everywhere.
        """
        digest = hashlib.sha256()
        for _, offset, size, described in sorted(infos):
            begin, sample = start + offset, min(size, _SAMPLE)
            digest.update(described)
            digest.update(self._read(begin, sample))
            digest.update(self._read(begin + size - sample, sample))
        return "gguf:" + digest.hexdigest()[:32]
