"""The header of a GGUF file: what is read from a sound one, and what is refused before native code sees it."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tars_core.models.gguf import GGUFHeader, probe, read_header
from tars_core.types.errors import LoadFailed

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d",
}  # fmt: skip
BOS, EOS = "<s>", "</s>"
TYPE_F32, TYPE_Q4_0, TYPE_Q8_0, TYPE_Q4_K = 0, 2, 8, 12
ALIGNMENT = 32


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: object) -> bytes:
    return text(value) if isinstance(value, str | bytes) else struct.pack("<" + CODES[kind], value)


def entry(key: str | bytes, kind: int, value: object) -> bytes:
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(kind: int, values: list[object]) -> bytes:
    return struct.pack("<IQ", kind, len(values)) + b"".join(scalar(kind, value) for value in values)


def array_entry(key: str, kind: int, values: list[object]) -> bytes:
    return text(key) + struct.pack("<I", ARRAY) + array(kind, values)


class Tensor(NamedTuple):
    name: str | bytes = "blk.0.attn_q.weight"
    shape: tuple[int, ...] = (32, 2)
    kind: int = TYPE_F32
    offset: int = 0
    data: bytes = bytes(256)


ENTRIES = {
    "general.architecture": entry("general.architecture", STRING, "llama"),
    "general.name": entry("general.name", STRING, "Tiny"),
    "llama.context_length": entry("llama.context_length", U32, 512),
    "llama.block_count": entry("llama.block_count", U32, 3),
    "llama.embedding_length": entry("llama.embedding_length", U32, 64),
    "llama.attention.head_count": entry("llama.attention.head_count", U32, 4),
    "llama.attention.head_count_kv": entry("llama.attention.head_count_kv", U32, 2),
    "tokenizer.ggml.model": entry("tokenizer.ggml.model", STRING, "gpt2"),
    "tokenizer.ggml.tokens": array_entry("tokenizer.ggml.tokens", STRING, ["a", BOS, "ñ", EOS]),
    "tokenizer.ggml.scores": array_entry("tokenizer.ggml.scores", F32, [0.0, 0.5, 1.0, 1.5]),
    "tokenizer.ggml.bos_token_id": entry("tokenizer.ggml.bos_token_id", U32, 1),
    "tokenizer.ggml.eos_token_id": entry("tokenizer.ggml.eos_token_id", U32, 3),
    "tokenizer.chat_template": entry("tokenizer.chat_template", STRING, "{{ messages }}"),
}
"""A sound header's entries; the tests replace some."""


def gguf(
    changes: Mapping[str, bytes | None] | None = None,
    tensors: tuple[Tensor, ...] = (Tensor(),),
    *,
    version: int = 3,
    counts: tuple[int | None, int | None] = (None, None),
) -> bytes:
    """Return the bytes of a file; ``changes`` replaces an entry, adds one, or (``None``) leaves one out."""
    entries = [raw for raw in {**ENTRIES, **(changes or {})}.values() if raw is not None]
    tensor_count, entry_count = counts
    head = b"GGUF" + struct.pack("<I", version)
    head += struct.pack(
        "<QQ",
        *(
            len(tensors) if tensor_count is None else tensor_count,
            len(entries) if entry_count is None else entry_count,
        ),
    )
    head += b"".join(entries)
    for tensor in tensors:
        head += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += b"".join(struct.pack("<Q", size) for size in tensor.shape)
        head += struct.pack("<IQ", tensor.kind, tensor.offset)
    head += bytes(-len(head) % ALIGNMENT)
    body = bytearray()
    for tensor in tensors:
        if tensor.data:
            body += bytes(max(0, tensor.offset - len(body))) + tensor.data
    return head + bytes(body)


Read = Callable[[bytes], GGUFHeader]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Read:
    """Return a function that writes bytes to a file and reads its header."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"

    def read_bytes(data: bytes) -> GGUFHeader:
        path.write_bytes(data)
        return read_header(path)

    return read_bytes


def sound(read: Read, data: bytes) -> bool:
    """Say whether ``data`` is accepted; anything but acceptance and ``LoadFailed`` is an error of the test's."""
    try:
        read(data)
    except LoadFailed as error:
        return not error.message  # every refusal says why
    return True


# ---- what is read ------------------------------------------------------------------------------


def test_what_the_loading_is_decided_by_is_read_from_a_sound_file(read: Read) -> None:
    header = read(gguf())
    assert (header.architecture, header.name, header.context_length) == ("llama", "Tiny", 512)
    assert (header.block_count, header.embedding_length) == (3, 64)
    assert (header.head_count, header.head_count_kv, header.key_length, header.value_length) == (4, 2, 16, 16)
    assert (header.chat_template, header.bos_token, header.eos_token) == ("{{ messages }}", "<s>", "</s>")
    assert header.tensor_bytes == 256


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions_in_use_are_read(read: Read, version: int) -> None:
    assert read(gguf(version=version)).name == "Tiny"


def test_what_a_file_leaves_out_has_a_default(read: Read) -> None:
    header = read(gguf({key: None for key in ENTRIES if key != "general.architecture"}))
    assert (header.name, header.context_length, header.chat_template) == ("model", 2048, None)
    assert (header.bos_token, header.eos_token, header.adds_bos) == ("", "", False)


def test_an_entry_of_an_unexpected_type_counts_as_left_out(read: Read) -> None:
    header = read(
        gguf(
            {
                "general.name": entry("general.name", U32, 7),
                "llama.context_length": entry("llama.context_length", STRING, "long"),
                "llama.attention.head_count_kv": array_entry("llama.attention.head_count_kv", U32, [2, 2, 1]),
                "tokenizer.ggml.bos_token_id": entry("tokenizer.ggml.bos_token_id", BOOL, 1),
            }
        )
    )
    assert (header.name, header.context_length, header.head_count_kv, header.bos_token) == ("model", 2048, 4, "")


@pytest.mark.parametrize("kind", sorted(CODES))
def test_every_type_of_value_and_array_is_passed_over(read: Read, kind: int) -> None:
    added = {"x": entry("x", kind, 1), "y": array_entry("y", kind, [1, 0, 1]), "z": array_entry("z", kind, [])}
    assert read(gguf(added)).eos_token == EOS


def test_arrays_of_arrays_are_passed_over(read: Read) -> None:
    inner = array(U16, [1, 2, 3])
    nested = text("x") + struct.pack("<IIQ", ARRAY, ARRAY, 2) + inner + inner
    assert read(gguf({"x": nested})).eos_token == EOS


def test_the_vocabulary_may_come_after_the_ids_that_point_into_it(read: Read) -> None:
    late = {"tokenizer.ggml.tokens": None, "tokens": ENTRIES["tokenizer.ggml.tokens"]}
    header = read(gguf(late))
    assert (header.bos_token, header.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("index", [0, 1, 4095, 4096, 4097, 8191, 9_997, 9_999])
def test_a_token_is_found_wherever_it_is_in_a_long_vocabulary(read: Read, index: int) -> None:
    chance = random.Random(1)  # noqa: S311 - no secret
    tokens: list[object] = [f"{n}-" + "x" * chance.randrange(200) for n in range(10_000)]
    tokens[4000] = "y" * 2**20  # longer than what is read at once
    tokens[9_998] = "z" * 2**19
    changed = {
        "tokenizer.ggml.tokens": array_entry("tokenizer.ggml.tokens", STRING, tokens),
        "tokenizer.ggml.bos_token_id": entry("tokenizer.ggml.bos_token_id", U32, index),
    }
    header = read(gguf(changed))
    assert (header.bos_token, header.chat_template) == (tokens[index], "{{ messages }}")


@pytest.mark.parametrize("index", [-1, 4, 2**31 - 1])
def test_a_token_outside_the_vocabulary_has_no_text(read: Read, index: int) -> None:
    changed = {"tokenizer.ggml.bos_token_id": entry("tokenizer.ggml.bos_token_id", I32, index)}
    assert read(gguf(changed)).bos_token == ""


@pytest.mark.parametrize(
    ("vocabulary", "stated", "adds"),
    [("llama", None, True), ("gpt2", None, False), ("llama", False, False), ("gpt2", True, True)],
)
def test_the_tokenizer_adds_a_bos_where_the_file_says_so_else_where_llama_cpp_would(
    read: Read, vocabulary: str, *, stated: bool | None, adds: bool
) -> None:
    changed = {"tokenizer.ggml.model": entry("tokenizer.ggml.model", STRING, vocabulary)}
    if stated is not None:
        changed["add"] = entry("tokenizer.ggml.add_bos_token", BOOL, stated)
    assert read(gguf(changed)).adds_bos is adds


def test_texts_nobody_needs_may_be_in_any_encoding(read: Read) -> None:
    latin = {
        "general.name": entry("general.name", STRING, b"Jos\xe9"),
        "author": entry("general.author", STRING, b"Jos\xe9"),
        "key": entry(b"caf\xe9", U32, 1),
    }
    header = read(gguf(latin, (Tensor(b"bl\xe9"),)))
    assert (header.name, header.architecture, header.eos_token) == ("Jos\ufffd", "llama", EOS)


def test_quantised_tensors_are_measured_in_blocks(read: Read) -> None:
    tensors = (
        Tensor("a", (64, 2), TYPE_Q4_0, 0, bytes(4 * 18)),
        Tensor("b", (32, 3), TYPE_Q8_0, 96, bytes(3 * 34)),
        Tensor("c", (256,), TYPE_Q4_K, 224, bytes(144)),
    )
    assert read(gguf(tensors=tensors)).tensor_bytes == 4 * 18 + 3 * 34 + 144


def test_the_key_value_cache_is_two_16_bit_numbers_a_place(read: Read) -> None:
    header = read(gguf())
    keys_and_values, bytes_each, blocks, heads, length = 2, 2, 3, 2, 16
    assert header.kv_bytes(1) == keys_and_values * bytes_each * blocks * heads * length
    assert header.kv_bytes(1000) == 1000 * header.kv_bytes(1)


def test_heads_that_are_longer_than_their_share_of_the_embedding_take_more_cache(read: Read) -> None:
    lengths = {
        "k": entry("llama.attention.key_length", U32, 128),
        "v": entry("llama.attention.value_length", U32, 64),
    }
    assert read(gguf(lengths)).kv_bytes(10) == 10 * 2 * 3 * 2 * (128 + 64)


def test_no_heads_are_no_division_by_zero(read: Read) -> None:
    changed = {"llama.attention.head_count": entry("llama.attention.head_count", U32, 0)}
    assert read(gguf(changed)).kv_bytes(10) >= 0


# ---- weights -----------------------------------------------------------------------------------


def test_a_rewritten_header_leaves_the_weights_the_same(read: Read) -> None:
    renamed = {
        "general.name": entry("general.name", STRING, "another name, much longer than the one before"),
        "tokenizer.chat_template": None,
    }
    assert read(gguf(renamed)).weights_id == read(gguf()).weights_id


def test_the_order_of_the_tensors_does_not_matter(read: Read) -> None:
    a, b = b"a" * 64, b"b" * 64
    one = (Tensor("a", (16,), TYPE_F32, 0, a), Tensor("b", (16,), TYPE_F32, 64, b))
    other = (Tensor("b", (16,), TYPE_F32, 0, b), Tensor("a", (16,), TYPE_F32, 64, a))
    assert read(gguf(tensors=one)).weights_id == read(gguf(tensors=other)).weights_id


@pytest.mark.parametrize(
    "tensor",
    [
        Tensor(name="blk.0.attn_k.weight"),
        Tensor(shape=(2, 32)),
        Tensor(kind=26),
        Tensor(data=b"\x01" + bytes(255)),
        Tensor(data=bytes(255) + b"\x01"),
    ],
    ids=["name", "shape", "type", "first byte", "last byte"],
)
def test_other_names_shapes_types_or_contents_are_other_weights(read: Read, tensor: Tensor) -> None:
    assert read(gguf(tensors=(tensor,))).weights_id != read(gguf()).weights_id


@pytest.mark.parametrize("place", [0, 2**15 - 1], ids=["first byte", "last byte"])
def test_of_a_large_tensor_both_ends_count(read: Read, place: int) -> None:
    contents = bytearray(2**15)
    shape = (2**13,)
    before = read(gguf(tensors=(Tensor(shape=shape, data=bytes(contents)),))).weights_id
    contents[place] = 1
    assert read(gguf(tensors=(Tensor(shape=shape, data=bytes(contents)),))).weights_id != before


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "shorter than a GGUF header"),
        (b"GGUF", "shorter than a GGUF header"),
        (b"GGML" + gguf()[4:], "begins with b'GGML'"),
        (b"PK\x03\x04" + bytes(100), "begins with"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "begins with b'vers'"),
        (gguf(version=1), "version 1 is unknown"),
        (gguf(version=4), "version 4 is unknown"),
        (b"GGUF\x00\x00\x00\x03" + bytes(100), "version 50331648 is unknown"),
        (gguf(counts=(2**63, None)), f"claims {2**63} tensors"),
        (gguf(counts=(None, 2**64 - 1)), f"claims {2**64 - 1} entries"),
        (gguf(counts=(None, 2**20)), "."),
        (gguf(counts=(10**6, None)), "."),
        (gguf(tensors=(), counts=(10**6, 13)), "cut short"),
        (gguf(counts=(0, None)), "holds no tensors"),
        (gguf({"general.architecture": None}), "names no architecture"),
        (gguf({"general.architecture": entry("general.architecture", STRING, "")}), "names no architecture"),
        (gguf({"x": struct.pack("<Q", 2**40)}), "a text of 1099511627776 bytes"),
        (gguf({"x": text("x") + struct.pack("<IQ", STRING, 2**23)}), "cut short"),
        (gguf({"x": text("x") + struct.pack("<IQ", STRING, 2**64 - 1)}), "cut short"),
        (gguf({"x": text("x") + struct.pack("<I", 13)}), "unknown type 13"),
        (gguf({"x": text("x") + struct.pack("<IIQ", ARRAY, 99, 1)}), "unknown type 99"),
        (gguf({"x": text("x") + struct.pack("<IIQ", ARRAY, U8, 2**63)}), f"claims {2**63} elements"),
        (gguf({"x": text("x") + struct.pack("<IIQ", ARRAY, U64, 2**28)}), "cut short"),
        (gguf({"x": text("x") + struct.pack("<IIQ", ARRAY, STRING, 2**28)}), "cut short"),
        (gguf({"x": text("x") + struct.pack("<IIQQ", ARRAY, STRING, 2, 2**64 - 1)}), "cut short"),
        (gguf({"x": text("x") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 1) * 50}), "nested too deep"),
        (gguf({"x": text("x") + struct.pack("<I", ARRAY) + struct.pack("<IQ", ARRAY, 2**28) * 3}), "."),
        (gguf({"general.name": text("general.name") + struct.pack("<IQ", STRING, 2**25)}), "a text of 33554432 bytes"),
        (
            gguf({"tokenizer.chat_template": entry("tokenizer.chat_template", STRING, b"\xff")}),
            "chat template is not valid UTF-8",
        ),
        (gguf({"x": entry("llama.context_length", I32, -1)}), "llama.context_length is -1"),
        (gguf({"x": entry("llama.block_count", U64, 2**40)}), "llama.block_count is 1099511627776"),
        (gguf({"x": entry("general.alignment", U32, 0)}), "alignment is 0"),
        (gguf({"x": entry("general.alignment", U32, 48)}), "alignment is 48"),
        (gguf(tensors=(Tensor(shape=()),)), "0 dimensions"),
        (gguf(tensors=(Tensor(shape=(1,) * 5),)), "5 dimensions"),
        (gguf(tensors=(Tensor(shape=(32, 0)),)), "0 elements"),
        (gguf(tensors=(Tensor(shape=(2**32, 2**32)),)), "elements"),
        (gguf(tensors=(Tensor(shape=(2**63, 2**63, 2**63, 2**63)),)), "elements"),
        (gguf(tensors=(Tensor(kind=4),)), "unknown type 4"),
        (gguf(tensors=(Tensor(kind=2**32 - 1),)), "unknown type"),
        (gguf(tensors=(Tensor(shape=(33,), kind=TYPE_Q4_0),)), "not a whole number of blocks"),
        (gguf(tensors=(Tensor(offset=1),)), "begins at 1"),
        (gguf(tensors=(Tensor(offset=2**63, data=b""),)), "past the end of the file"),
        (gguf(tensors=(Tensor(offset=32, data=b""),)), "past the end of the file"),
        (gguf(tensors=(Tensor(data=bytes(255)),)), "ends 1 bytes past the end"),
        (gguf(tensors=(Tensor(shape=(2**40,), data=b""),)), "past the end of the file"),
    ],
)
def test_19_what_no_sound_file_states_is_refused_with_the_reason(read: Read, data: bytes, why: str) -> None:
    with pytest.raises(LoadFailed, match=why) as refused:
        read(data)
    assert refused.value.message.startswith("model.gguf is not a valid GGUF file: ")
    assert refused.value.hint == "copy or download the file again"


def test_19_a_file_cut_short_at_any_length_is_refused(read: Read) -> None:
    data = gguf()
    assert [length for length in range(len(data)) if sound(read, data[:length])] == []
    assert sound(read, data)


def test_19_a_header_of_endless_length_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf({"x": text("x") + struct.pack("<IIQ", ARRAY, U8, 2**28)}))
    os.truncate(path, 2**30)  # a hole: nothing is written
    with pytest.raises(LoadFailed, match="header is longer than 268435456 bytes"):
        read_header(path)


READS_WHILE_IT_IS_CUT = """
import json, pathlib, sys
from tars_core.models.gguf import read_header
from tars_core.types.errors import LoadFailed

path, said = pathlib.Path(sys.argv[1]), []
print(flush=True)
while len(said) < 300 or (len(said) < 10_000 and not ("" in said and any(said))):
    try:
        said.append("" if read_header(path).eos_token == "</s>" else "another token")
    except LoadFailed as error:
        said.append(error.message)
print(json.dumps(said))
"""


def test_41_a_file_that_is_cut_short_while_it_is_read_is_refused_and_ends_no_process(tmp_path: Path) -> None:
    chance = random.Random(41)  # noqa: S311 - no secret
    vocabulary = array_entry("tokenizer.ggml.tokens", STRING, ["a", BOS, "b", EOS, *(["word"] * 20_000)])
    data = gguf({"tokenizer.ggml.tokens": vocabulary}, (Tensor(shape=(2**17,), data=bytes(2**19)),))
    path = tmp_path / "cut.gguf"
    path.write_bytes(data)
    command = [sys.executable, "-c", READS_WHILE_IT_IS_CUT, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it begins to read
        while child.poll() is None:
            os.truncate(path, chance.randrange(len(data)))
            with path.open("r+b") as file:
                file.write(data)
        out, err = child.communicate()
    assert (child.returncode, err) == (0, "")
    # Some reads were undisturbed, and all others were refused in these words.
    assert {message.partition(": ")[0] for message in json.loads(out)} == {"", "cut.gguf is not a valid GGUF file"}


def test_bytes_after_the_last_tensor_do_no_harm(read: Read) -> None:
    assert sound(read, gguf() + bytes(100))


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, len(gguf()) - 257), st.integers(0, 255)), min_size=1, max_size=4))
def test_19_bytes_changed_at_random_are_refused_or_read_but_never_crash(
    read: Read, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(gguf())
    for place, value in changes:
        data[place] = value
    sound(read, bytes(data))


HOSTILE = st.sampled_from([0, 1, 8, 9, 2**16, 2**20, 2**28, 2**31, 2**32 - 1, 2**63, 2**64 - 8, 2**64 - 1])


@settings(max_examples=150)
@given(st.integers(8, len(gguf()) - 264), HOSTILE)
def test_19_a_hostile_number_anywhere_is_refused_or_read_but_never_crashes(read: Read, place: int, number: int) -> None:
    data = bytearray(gguf())
    data[place : place + 8] = struct.pack("<Q", number)
    sound(read, bytes(data))


@given(st.binary(max_size=200))
def test_19_garbage_after_a_sound_beginning_is_refused(read: Read, garbage: bytes) -> None:
    assert not sound(read, b"GGUF" + struct.pack("<I", 3) + garbage)


def test_a_file_that_cannot_be_opened_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(IsADirectoryError):
        read_header(tmp_path)


# ---- the report on a file ----------------------------------------------------------------------


def test_a_report_states_what_the_header_tells(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf())
    report = probe(path, device="cpu", overhead_bytes=1000, preference=60)
    assert (report.available, report.device, report.memory_bytes) == (True, "cpu", 1256)
    assert (report.context_length, report.preference) == (512, 60)
    assert report.weights_id == read_header(path).weights_id
    assert probe(path, device="cuda", overhead_bytes=1000, preference=60).memory_bytes is None


def test_a_report_gives_the_reason_why_a_file_cannot_be_run(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf()[:100])
    report = probe(path, device="cpu", overhead_bytes=0, preference=60)
    assert not report.available
    assert "is cut short" in str(report.reason)
    assert report.hint == "copy or download the file again"
    absent = probe(tmp_path / "absent.gguf", device="cpu", overhead_bytes=0, preference=60)
    assert str(absent.reason).endswith("absent.gguf cannot be read: No such file or directory")


# ---- speed -------------------------------------------------------------------------------------


def test_a_vocabulary_of_150_000_tokens_is_read_in_0_3_seconds(tmp_path: Path) -> None:
    count = 150_000
    words = b"".join(text(f"token-{n}") for n in range(count))
    merges = b"".join(text(f"to ken-{n}") for n in range(2 * count))
    vocabulary = {
        "tokenizer.ggml.tokens": text("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, count) + words,
        "merges": text("tokenizer.ggml.merges") + struct.pack("<IIQ", ARRAY, STRING, 2 * count) + merges,
        "types": text("tokenizer.ggml.token_type") + struct.pack("<IIQ", ARRAY, I32, count) + bytes(4 * count),
        "tokenizer.ggml.bos_token_id": entry("tokenizer.ggml.bos_token_id", U32, count - 2),
        "tokenizer.ggml.eos_token_id": entry("tokenizer.ggml.eos_token_id", U32, count - 1),
    }
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf(vocabulary))
    durations = []
    for _ in range(3):
        began = time.process_time()  # other processes cost wall time only
        header = read_header(path)
        durations.append(time.process_time() - began)
    assert header.eos_token == f"token-{count - 1}"
    assert min(durations) <= 0.3
