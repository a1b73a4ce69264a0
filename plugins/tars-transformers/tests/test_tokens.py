"""From text to tokens and back, over tokenizers of the kinds that language models have."""

from __future__ import annotations

import threading
import time

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import tars_demo_model
from tars_core.plugin import Answer, GenerateRequest, SamplingParams, TextDelta, least_tokens
from tars_transformers.tokens import Vocabulary

UNKNOWN = "<unk>"
TEXTS = ["¿Qué? ñandú", "👩‍🚀 👍🏽 🇪🇸", "e\u0301 a\u0308\u0323", "漢字かな交じり文", "a\0b\U0010ffff"]


def _demo() -> Tokenizer:
    return Tokenizer.from_file(str(tars_demo_model.WEIGHTS / "tokenizer.json"))


def _sentencepiece() -> Tokenizer:
    pieces = [UNKNOWN, "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁ab", "é"]
    vocabulary = {piece: at for at, piece in enumerate(pieces)}
    native = Tokenizer(
        models.BPE(vocabulary, [("▁", "a"), ("▁a", "b")], unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True)
    )
    native.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    native.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    native.add_special_tokens(["<s>", "</s>"])
    native.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    return native


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("native", [_demo(), _sentencepiece()], ids=["byte-level", "sentencepiece"])
def test_every_text_comes_back_and_no_character_comes_in_halves(native: Tokenizer, text: str) -> None:
    vocabulary = Vocabulary(native)
    decode = vocabulary.decoder()
    pieces = [decode(token) for token in vocabulary.tokenize(text)]
    assert "".join(pieces).removeprefix(" ") == text
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_cut_by_max_tokens_is_dropped(text: str) -> None:
    vocabulary = Vocabulary(_demo())
    tokens = vocabulary.tokenize(text)
    for limit in range(1, len(tokens) + 1):
        request = GenerateRequest(tokens=(1,), sampling=SamplingParams(max_tokens=limit))
        answer = Answer(vocabulary.decoder(), request)
        events = [event for token in tokens[:limit] for event in answer.push(token, ends=False)]
        shown = "".join(event.text for event in events if isinstance(event, TextDelta))
        assert answer.finished
        assert text.startswith(shown)
        assert "\ufffd" not in shown


def test_bytes_that_are_no_text_are_shown_as_such() -> None:
    vocabulary = Vocabulary(_sentencepiece())
    decode = vocabulary.decoder()
    assert [decode(3 + byte) for byte in (0xC3, 0x28, 0xFF, 0xF0)] == ["", "\ufffd(", "\ufffd", ""]


def test_what_the_tokenizer_puts_in_front_is_kept_and_what_it_puts_behind_is_not() -> None:
    vocabulary = Vocabulary(_sentencepiece())
    assert vocabulary.prefix == [1]
    assert vocabulary.tokenize("a</s>") == [1, vocabulary.tokenize("a")[1], 2]
    assert Vocabulary(_demo()).prefix == []


def test_special_tokens_have_no_text_and_other_added_ones_their_own() -> None:
    native = _demo()
    native.add_tokens([AddedToken("é  ", special=False)])
    vocabulary = Vocabulary(native)
    (special,) = vocabulary.tokenize("<|im_end|>")
    (added,) = vocabulary.tokenize("é  ")
    assert (vocabulary.piece(special), vocabulary.piece(added)) == (b"", "é  ".encode())
    assert vocabulary.special["<|im_end|>"] == special
    assert vocabulary.piece(10**6) == b""


def test_a_tokenizer_that_would_cut_or_fill_up_does_not() -> None:
    native = _demo()
    native.enable_truncation(3)
    native.enable_padding(length=50)
    assert len(Vocabulary(native).tokenize("uno dos tres cuatro cinco seis")) > 3


def test_a_tokenizer_of_another_kind_is_decoded_by_itself() -> None:
    native = Tokenizer(models.WordPiece({UNKNOWN: 0, "wal": 1, "##king": 2, "home": 3}, unk_token=UNKNOWN))
    native.pre_tokenizer = pre_tokenizers.Whitespace()
    native.decoder = decoders.WordPiece()
    vocabulary = Vocabulary(native)
    decode = vocabulary.decoder()
    assert "".join(map(decode, vocabulary.tokenize("walking home"))) == "walking home"


def test_a_long_text_is_tokenised_beside_other_threads() -> None:
    vocabulary = Vocabulary(_demo())
    tokenising = threading.Thread(target=vocabulary.tokenize, args=("TARS " * 300_000,))
    began = before = time.monotonic()
    longest = 0.0
    tokenising.start()
    while tokenising.is_alive():
        time.sleep(0.001)
        longest, before = max(longest, time.monotonic() - before), time.monotonic()
    assert longest < (before - began) / 2, "it holds the GIL all the time"


def test_a_very_long_text_is_not_estimated_above_its_count() -> None:
    vocabulary = Vocabulary(_demo())
    long = "TARS " * 300_000
    assert 0 < least_tokens(long, vocabulary.longest) <= len(vocabulary.tokenize(long))
