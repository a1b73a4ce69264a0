"""Where one line of an answer ends and the next begins."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ollama_stand_in import RECORDINGS

from tars_ollama.client import LineSplitter
from tars_ollama.failures import Fault


def _lines(data: bytes, cuts: list[int]) -> list[bytes]:
    splitter = LineSplitter()
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    lines = [line for a, b in itertools.pairwise(borders) for line in splitter.push(data[a:b])]
    return [*lines, *([rest] if (rest := splitter.rest()) else [])]


@given(
    st.lists(st.binary(min_size=1).filter(lambda b: b"\n" not in b and b.strip() == b)), st.lists(st.integers(0, 99))
)
def test_lines_are_the_same_however_the_bytes_are_cut(lines: list[bytes], cuts: list[int]) -> None:
    assert _lines(b"\n".join(lines), cuts) == lines
    assert _lines(b"".join(line + b"\n" for line in lines), cuts) == lines


@pytest.mark.parametrize("name", ["unicode-nel-ls-real", "line-separators", "unicode-split-emoji"])
def test_a_recorded_body_cut_after_every_byte_is_the_same_json(name: str) -> None:
    chunks = json.loads((RECORDINGS / f"{name}.json").read_text("utf-8"))["response"]["chunks"]
    data = "".join(chunk["data"] for chunk in chunks).encode()
    cut = _lines(data, list(range(len(data))))
    assert [json.loads(line) for line in cut] == [json.loads(line) for line in data.split(b"\n") if line]


def test_a_line_without_an_end_is_given_up_before_it_fills_the_memory() -> None:
    splitter = LineSplitter()
    for _ in range(16):
        assert list(splitter.push(b"x" * 2**20)) == []
    with pytest.raises(Fault, match="16 MiB"):
        list(splitter.push(b"x"))
