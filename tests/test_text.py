"""Text as it grows: whole characters and stop strings, however the stream was cut."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tars_core.kit.text import StopFilter, Utf8Assembler

FEW_LETTERS = st.text("abc", max_size=12)  # few letters: stop strings overlap each other and themselves
EVERY_WIDTH = "a\0ñ€漢\u0301\u200d\U0001f680\U0010ffff"  # one to four bytes, combining, joining, the last of all
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple)


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[slice]:
    """Return slices that cut something of ``length`` into pieces, some of them perhaps empty."""
    places = sorted(draw(st.lists(st.integers(0, length), max_size=8)))
    return [slice(begin, end) for begin, end in pairwise([0, *places, length])]


def cut_at_first_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Read a character at a time; the first stop string to be complete ends the text."""
    for end in range(1, len(text) + 1):
        complete = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: min(complete)], True
    return text, False


def shown(pieces: Sequence[str], stops: tuple[str, ...]) -> tuple[str, bool]:
    stop = StopFilter(stops)
    return "".join([*(stop.push(piece) for piece in pieces), stop.flush()]), stop.stopped


# ---- stop strings ------------------------------------------------------------------------------


def test_a_stop_string_across_two_pieces_ends_the_text() -> None:
    assert shown(["hello Us", "er: x"], ("User:",)) == ("hello ", True)


def test_a_stop_string_across_many_pieces_ends_the_text() -> None:
    assert shown(list("hello User: x"), ("User:",)) == ("hello ", True)


def test_the_stop_string_itself_is_never_shown() -> None:
    assert shown(["User:"], ("User:",)) == ("", True)


def test_what_only_began_like_a_stop_string_is_shown_as_soon_as_that_is_clear() -> None:
    stop = StopFilter(("User:",))
    assert [stop.push("hi Us"), stop.push("ual")] == ["hi ", "Usual"]
    assert not stop.stopped


def test_the_end_of_the_text_releases_what_was_held_back() -> None:
    stop = StopFilter(("User:",))
    assert stop.push("hi User") == "hi "
    assert stop.flush() == "User"
    assert stop.flush() == ""
    assert not stop.stopped


def test_nothing_is_shown_after_the_stop() -> None:
    stop = StopFilter(("END",))
    assert stop.push("one END two") == "one "
    assert stop.push("three") == ""
    assert stop.flush() == ""


def test_a_stop_string_that_overlaps_its_own_beginning_is_found() -> None:
    assert shown(["aa", "ab"], ("aab",)) == ("a", True)


@pytest.mark.parametrize("pieces", [["xabcd"], ["xabc", "d"], ["xab", "cd"], ["x", "a", "b", "c", "d"]])
def test_of_two_stop_strings_the_first_to_be_complete_ends_the_text_however_it_is_cut(pieces: list[str]) -> None:
    assert shown(pieces, ("abcd", "c")) == ("xab", True)


def test_of_two_stop_strings_that_end_together_the_longer_is_cut_off() -> None:
    assert shown(["xabc"], ("bc", "abc")) == ("x", True)


def test_without_stop_strings_every_piece_passes_through() -> None:
    stop = StopFilter(())
    assert [stop.push("a"), stop.push(""), stop.push("b"), stop.flush()] == ["a", "", "b", ""]


@given(st.data(), FEW_LETTERS, STOPS)
def test_any_chunking_gives_the_text_before_the_first_stop_string(
    data: st.DataObject, text: str, stops: tuple[str, ...]
) -> None:
    pieces = [text[piece] for piece in data.draw(cuts(len(text)))]
    assert shown(pieces, stops) == cut_at_first_stop(text, stops)


@given(st.lists(FEW_LETTERS, max_size=6), STOPS)
def test_no_more_is_held_back_than_could_still_become_a_stop_string(pieces: list[str], stops: tuple[str, ...]) -> None:
    stop = StopFilter(stops)
    pushed = out = ""
    for piece in pieces:
        pushed += piece
        out += stop.push(piece)
        assert pushed.startswith(out)
        held = pushed[len(out) :]
        assert stop.stopped or not held or any(s.startswith(held) for s in stops)


@given(
    st.data(),
    st.text(EVERY_WIDTH, max_size=20),
    st.lists(st.text(EVERY_WIDTH, min_size=1, max_size=3), max_size=3).map(tuple),
)
def test_chunking_does_not_matter_in_any_script(data: st.DataObject, text: str, stops: tuple[str, ...]) -> None:
    pieces = [text[piece] for piece in data.draw(cuts(len(text)))]
    assert shown(pieces, stops) == cut_at_first_stop(text, stops)


# ---- UTF-8 -------------------------------------------------------------------------------------


def assembled(pieces: Sequence[bytes]) -> str:
    utf8 = Utf8Assembler()
    return "".join(utf8.push(piece) for piece in pieces)


def test_a_character_whose_bytes_come_one_by_one_appears_whole_with_its_last_byte() -> None:
    utf8 = Utf8Assembler()
    assert [utf8.push(bytes([byte])) for byte in "🚀".encode()] == ["", "", "", "🚀"]


def test_a_byte_that_is_no_utf8_becomes_the_replacement_character() -> None:
    assert assembled([b"a\xff", b"b"]) == "a\N{REPLACEMENT CHARACTER}b"


def test_a_character_broken_off_by_another_becomes_the_replacement_character() -> None:
    assert assembled([b"\xe2\x82", b"x"]) == "\N{REPLACEMENT CHARACTER}x"


def test_a_surrogate_written_as_utf8_never_becomes_a_lone_surrogate() -> None:
    assert set(assembled([b"\xed\xa0", b"\x80"])) == {"\N{REPLACEMENT CHARACTER}"}


def test_a_character_unfinished_at_the_end_is_dropped() -> None:
    assert assembled(["né".encode()[:-1]]) == "n"


@given(st.data(), st.text(EVERY_WIDTH, max_size=20))
def test_any_chunking_of_valid_bytes_gives_the_text_without_replacement(data: st.DataObject, text: str) -> None:
    raw = text.encode()
    assert assembled([raw[piece] for piece in data.draw(cuts(len(raw)))]) == text


@given(st.data(), st.binary(max_size=24))
def test_any_chunking_of_any_bytes_equals_decoding_them_whole(data: st.DataObject, raw: bytes) -> None:
    terminated = raw + b"."  # decides a character still unfinished at the end
    pieces = [terminated[piece] for piece in data.draw(cuts(len(terminated)))]
    assert assembled(pieces) == terminated.decode(errors="replace")
