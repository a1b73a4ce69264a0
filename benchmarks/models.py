"""The model that is measured: the shape of SmolLM2-135M, random weights, made once and kept in the user's cache.

Its vocabulary makes counting exact. Each of ``WORDS``, with or without a space before it, is one token, so a prompt of
60 words has 60 tokens. The end token and the 256 bytes have rows of zeros in the embedding, which are the output's rows
too: with a logit of 0 they are never the likeliest of 49,152. So every answer is as long as it may be, and every token
of it is whole text.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import numpy.typing as npt
import platformdirs

Array: TypeAlias = npt.NDArray[Any]

_LAYERS, _WIDTH, _HEADS, _KV_HEADS, _FEED_FORWARD, _VOCABULARY, _CONTEXT = 30, 576, 9, 3, 1536, 49152, 8192
_SEED = 135
_NAME = "llama-135m-q8_0-1.gguf"  # count up when what is written changes
_Q8_0 = gguf.GGMLQuantizationType.Q8_0

_SYLLABLES = list(itertools.product("bcdfghjklmnpqrstvwxyz", "aeiou"))
WORDS = tuple(map("".join, _SYLLABLES))
_SPACE = "Ġ"  # what byte-level BPE writes for it


def benchmark_model() -> Path:
    """Return the model's file, which is made unless it is there: 144 MB, a few seconds."""
    path = platformdirs.user_cache_path("tars", appauthor=False) / "benchmarks" / _NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        _write(unfinished)
        unfinished.replace(path)
    return path


def _write(path: Path) -> None:
    writer = gguf.GGUFWriter(path, arch="llama")
    writer.add_name("random weights in the shape of SmolLM2-135M")
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_Q8_0))
    writer.add_context_length(_CONTEXT)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(_LAYERS)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100_000.0)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_vocab_size(_VOCABULARY)
    _add_tokenizer(writer)
    for name, tensor in _tensors():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, _Q8_0), raw_dtype=_Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _bytes() -> list[str]:
    """Return GPT-2's character for each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = itertools.count(256)
    return [chr(byte if byte in shown else next(hidden)) for byte in range(256)]


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    known = ["<|endoftext|>", *_bytes(), *WORDS, *(_SPACE + word for word in WORDS)]
    others = map("".join, itertools.product(_SPACE, *[string.ascii_uppercase] * 4))  # only answers have them
    tokens = [*known, *itertools.islice(others, _VOCABULARY - len(known))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges([*map(" ".join, _SYLLABLES), *(f"{_SPACE} {word}" for word in WORDS)])
    writer.add_bos_token_id(0)  # where none is named, llama.cpp takes token 11
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(value=False)


def _tensors() -> Iterator[tuple[str, Array]]:
    random = np.random.default_rng(_SEED)

    def weights(rows: int, columns: int) -> Array:
        drawn = random.standard_normal((rows, columns), dtype=np.float32)
        scaled: Array = drawn / np.float32(columns**0.5)
        return scaled

    embedding = weights(_VOCABULARY, _WIDTH)
    embedding[: 1 + 256] = 0
    yield "token_embd.weight", embedding
    yield "output_norm.weight", np.ones(_WIDTH, dtype=np.float32)
    heads = _WIDTH * _KV_HEADS // _HEADS
    for layer in range(_LAYERS):
        for name, rows, columns in (
            ("attn_q", _WIDTH, _WIDTH),
            ("attn_k", heads, _WIDTH),
            ("attn_v", heads, _WIDTH),
            ("attn_output", _WIDTH, _WIDTH),
            ("ffn_gate", _FEED_FORWARD, _WIDTH),
            ("ffn_up", _FEED_FORWARD, _WIDTH),
            ("ffn_down", _WIDTH, _FEED_FORWARD),
        ):
            yield f"blk.{layer}.{name}.weight", weights(rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", np.ones(_WIDTH, dtype=np.float32)
