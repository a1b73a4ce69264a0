"""The demo model's tokenizer: byte-level BPE, a ChatML template, and BPE-dropout for training.

Byte-level BPE with the pre-tokeniser that llama.cpp calls ``qwen2`` is one of the few shapes that the
GGUF and the `tokenizers` library express alike, with no normaliser in between.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from random import Random

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
"""The control tokens; their ids are 0, 1 and 2. END is the token that ends an answer."""

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a vocabulary of exactly ``vocab_size`` tokens from ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the corpus only yields {tokenizer.get_vocab_size()} tokens")
    return tokenizer


class Encoder:
    """Encodes chat parts, user text optionally with BPE-dropout.

    With dropout a word is now and then cut into smaller tokens than usual, which is how a rare or
    misspelt word reaches the model. The `tokenizers` library draws its own dropout from a generator
    that cannot be seeded, hence the merges are applied here.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._vocab: dict[str, int] = tokenizer.get_vocab()
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(merges)}
        self._words: dict[str, list[int]] = {}
        self._heads = {role: self.encode(f"{START}{role}\n") for role in ("system", "user", "assistant")}
        self.end = self._vocab[END]
        self.newline = self.encode("\n")
        self._tail = [self.end, *self.newline]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; control tokens in it are recognised."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def turn(self, role: str, text: str, rng: Random | None = None, dropout: float = 0.0) -> list[int]:
        """Ids of one whole message. ``dropout`` is the share of words whose merges are disturbed."""
        if rng is None or dropout == 0.0:
            return self._heads[role] + self.encode(text) + self._tail
        ids: list[int] = []
        for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text):
            if rng.random() < dropout:
                ids += self._merge(word, rng, skip=0.3)
                continue
            if word not in self._words:
                self._words[word] = self._merge(word, rng, skip=0.0)
            ids += self._words[word]
        return self._heads[role] + ids + self._tail

    def answer_head(self) -> list[int]:
        """Ids of the generation prompt, ``<|im_start|>assistant`` and a newline."""
        return self._heads["assistant"]

    def _merge(self, word: str, rng: Random, skip: float) -> list[int]:
        """Apply the merges to one byte-level ``word``, leaving each out with probability ``skip``."""
        parts = list(word)
        while len(parts) > 1:
            best, at = len(self._ranks), -1
            for i in range(len(parts) - 1):
                rank = self._ranks.get((parts[i], parts[i + 1]))
                if rank is not None and rank < best and (skip == 0.0 or rng.random() >= skip):
                    best, at = rank, i
            if at < 0:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self._vocab[part] for part in parts]
