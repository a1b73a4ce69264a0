"""The header of a GGUF file, read in Python before native code sees the file.

Hostile and damaged files have crashed llama.cpp's own reader, and the ``gguf`` package needs half a minute for a
real vocabulary. This reader maps the file, skips what nobody asked for, and bounds every number it believes.
Format: the GGUF specification in ggml's documentation, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from tars_core.errors import LoadFailed
from tars_core.schema import ProbeReport

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ARRAY, _STRING = 9, 8
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
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
_STRIDE = 4096

# Elements and bytes of one block, by tensor type (ggml's type table).
_BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
    34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36), 41: (128, 18),
}  # fmt: skip


class GGUFHeader(msgspec.Struct, frozen=True, kw_only=True):
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


def probe(path: Path, *, device: str, overhead_bytes: int, concurrency: int, preference: int) -> ProbeReport:
    """Report on ``path`` for a backend that runs GGUF files: what its header tells, or why it cannot be run.

    ``overhead_bytes`` are what the backend needs beside the weights.
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
        concurrency=concurrency,
        preference=preference,
    )


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of ``path``.

    Raises :class:`~tars_core.errors.LoadFailed` where the file is no GGUF, is cut short, or states what no sound
    file states; ``OSError`` where it cannot be read.
    """
    with path.open("rb") as file:
        if path.stat().st_size < 24:  # noqa: PLR2004 - magic, version and two counts
            raise _damaged(path, "it is shorter than a GGUF header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _Reader(data, path).header()
            except (struct.error, UnicodeDecodeError, OverflowError) as error:
                raise _damaged(path, f"the header is cut short or garbled ({error})") from None


def _damaged(path: Path, why: str) -> LoadFailed:
    return LoadFailed(f"{path.name} is not a sound GGUF file: {why}", hint="copy or download the file again")


class _Strings(NamedTuple):
    """An array of strings that was skipped: how many, and where every 4,096th begins."""

    size: int
    places: list[int]


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 4
        self._skipped = _Strings(size=0, places=[])

    def header(self) -> GGUFHeader:
        if self._data[:4] != _MAGIC:
            raise _damaged(self._path, f"it begins with {self._data[:4]!r}")
        version = self._u32()
        if version not in _VERSIONS:
            raise _damaged(self._path, f"version {version} is unknown")
        tensors, entries = self._bounded("tensors", _MAX_TENSORS), self._bounded("entries", _MAX_ENTRIES)
        values: dict[str, object] = {}
        tokens = _Strings(size=0, places=[])
        for _ in range(entries):
            key = self._string(_MAX_KEY)
            kind = self._u32()
            self._skipped = _Strings(size=0, places=[])
            value = self._value(kind)
            if key == "tokenizer.ggml.tokens":
                tokens = self._skipped
            if value is not None:
                values[key] = value
        infos = list(self._tensor_infos(tensors))
        alignment = self._whole(values, "general.alignment", 32)
        if alignment <= 0 or alignment & (alignment - 1):
            raise _damaged(self._path, f"its alignment is {alignment}")
        start = -(-self._at // alignment) * alignment
        for name, offset, size, _ in infos:
            self._check_place(name, offset, start + offset + size, alignment)
        architecture = self._text(values, "general.architecture") or ""
        if not architecture or not infos:
            raise _damaged(self._path, "it names no architecture or holds no tensors")
        heads = self._whole(values, f"{architecture}.attention.head_count", 1)
        embedding = self._whole(values, f"{architecture}.embedding_length", 1)
        per_head = embedding // max(1, heads)
        return GGUFHeader(
            architecture=architecture,
            name=self._text(values, "general.name") or self._path.stem,
            context_length=self._whole(values, f"{architecture}.context_length", 2048),
            block_count=self._whole(values, f"{architecture}.block_count", 1),
            embedding_length=embedding,
            head_count=heads,
            head_count_kv=self._whole(values, f"{architecture}.attention.head_count_kv", heads),
            key_length=self._whole(values, f"{architecture}.attention.key_length", per_head),
            value_length=self._whole(values, f"{architecture}.attention.value_length", per_head),
            chat_template=self._text(values, "tokenizer.chat_template"),
            bos_token=self._token(tokens, values.get("tokenizer.ggml.bos_token_id")),
            eos_token=self._token(tokens, values.get("tokenizer.ggml.eos_token_id")),
            adds_bos=self._adds_bos(values),
            tensor_bytes=sum(size for _, _, size, _ in infos),
            weights_id=_weights_id(self._data, start, infos),
        )

    def _check_place(self, name: str, offset: int, end: int, alignment: int) -> None:
        if offset % alignment:
            raise _damaged(self._path, f"tensor {name} begins at {offset}, its alignment is {alignment}")
        if end > len(self._data):
            missing = end - len(self._data)
            raise _damaged(self._path, f"tensor {name} ends {missing} bytes past the end of the file")

    def _adds_bos(self, values: dict[str, object]) -> bool:
        stated = values.get("tokenizer.ggml.add_bos_token")
        # llama.cpp's default: only the SentencePiece vocabulary ("llama") adds one unasked.
        return stated if isinstance(stated, bool) else values.get("tokenizer.ggml.model") == "llama"

    def _text(self, values: dict[str, object], key: str) -> str | None:
        value = values.get(key)
        return value if isinstance(value, str) else None

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
        return self._string(_MAX_KEY)

    def _tensor_infos(self, count: int) -> Iterator[tuple[str, int, int, bytes]]:
        for _ in range(count):
            begin = self._at
            name = self._string(_MAX_KEY)
            dimensions = self._u32()
            if not 0 < dimensions <= _MAX_DIMENSIONS:
                raise _damaged(self._path, f"tensor {name} has {dimensions} dimensions")
            shape = [self._u64() for _ in range(dimensions)]
            kind = self._u32()
            described = self._data[begin : self._at]
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
                raise _damaged(self._path, f"a row of tensor {name} is no whole number of blocks")
            yield name, offset, elements // per_block * size, described

    def _value(self, kind: int, depth: int = 0) -> object:
        """Read a value; arrays are skipped and come back as ``None``."""
        if kind == _STRING:
            return self._string(_MAX_TEXT)
        if kind == _ARRAY:
            self._skip_array(depth)
            return None
        if kind not in _SCALARS:
            raise _damaged(self._path, f"a value has the unknown type {kind}")
        form = _SCALARS[kind]
        value: object = form.unpack_from(self._data, self._at)[0]
        self._at += form.size
        return value

    def _skip_array(self, depth: int) -> None:
        if depth >= _MAX_DEPTH:
            raise _damaged(self._path, "arrays are nested too deep")
        kind = self._u32()
        count = self._bounded("elements", _MAX_ELEMENTS)
        if kind == _STRING:
            self._skip_strings(count)
        elif kind == _ARRAY:
            for _ in range(count):
                self._skip_array(depth + 1)
        elif kind in _SCALARS:
            self._advance(count * _SCALARS[kind].size)
        else:
            raise _damaged(self._path, f"an array has the unknown type {kind}")

    def _skip_strings(self, count: int) -> None:
        # The hot loop: a vocabulary has 150,000 tokens and as many merges. Running past the end is a struct.error.
        at, data, unpack = self._at, self._data, _U64.unpack_from
        places = []
        for left in range(count, 0, -_STRIDE):
            places.append(at)
            for _ in range(min(left, _STRIDE)):
                at += 8 + unpack(data, at)[0]
        self._at = at
        self._skipped = _Strings(size=count, places=places)

    def _advance(self, size: int) -> None:
        if size > len(self._data) - self._at:
            raise _damaged(self._path, f"it ends inside a value of {size} bytes")
        self._at += size

    def _string(self, limit: int) -> str:
        size = self._u64()
        if size > limit:
            raise _damaged(self._path, f"a text of {size} bytes")
        begin = self._at
        self._advance(size)
        return self._data[begin : self._at].decode()

    def _bounded(self, what: str, limit: int) -> int:
        count = self._u64()
        if count > limit:
            raise _damaged(self._path, f"it claims {count} {what}")
        return count

    def _u32(self) -> int:
        value: int = _U32.unpack_from(self._data, self._at)[0]
        self._at += 4
        return value

    def _u64(self) -> int:
        value: int = _U64.unpack_from(self._data, self._at)[0]
        self._at += 8
        return value


def _weights_id(data: mmap.mmap, start: int, infos: list[tuple[str, int, int, bytes]]) -> str:
    """Digest names, shapes, types, and 8 KiB of each tensor.

    Whole files take minutes, and weights that differ at all differ nearly everywhere.
    """
    digest = hashlib.sha256()
    for _, offset, size, described in sorted(infos):
        digest.update(described)
        begin = start + offset
        digest.update(data[begin : begin + min(size, 4096)])
        digest.update(data[begin + max(0, size - 4096) : begin + size])
    return "gguf:" + digest.hexdigest()[:32]
