"""From hand-written phrasings to training conversations.

``published.toml`` holds what the model promises: one question and one answer per intent and language.
``corpus/`` holds what people may say instead. A phrasing may offer alternatives, ``(instalo|pongo|) un
backend``; one for `unknown` may have slots, ``{thing}``. Every draw comes from a seeded generator.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, Literal

import noise

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
UNKNOWN = "unknown"
HELD_OUT = 0.04
"""Share of the hand-written lines that training never sees."""
Lang = Literal["es", "en"]
LANGUAGES: tuple[Lang, ...] = ("es", "en")

_ONSETS = (*"bcdfgjklmnprstvz", "br", "cr", "tr", "pl", "gr", "st", "ch", "qu")
_SPLIT_FROM = 8
"""Intents with fewer lines than this keep them all for training."""

_CHOICE = re.compile(r"\(([^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One question and the answer expected."""

    intent: str
    lang: Lang
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Exchanges in order, perhaps under a system prompt."""

    system: str | None
    exchanges: tuple[Exchange, ...]


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file."""
    tables: dict[str, Any] = tomllib.loads(path.read_text("utf-8"))
    return tables


def published() -> list[Exchange]:
    """The promised questions and answers, every intent in both languages."""
    table = read_toml(HERE / "published.toml")
    return [
        Exchange(intent=intent, lang=lang, question=entry[lang][0], answer=entry[lang][1])
        for intent, entry in table.items()
        for lang in LANGUAGES
    ]


def expand(line: str, rng: Random) -> str:
    """Choose one of every group of alternatives, innermost first."""
    while found := _CHOICE.search(line):
        line = line[: found.start()] + rng.choice(found[1].split("|")) + line[found.end() :]
    line = re.sub(r"\s+", " ", line).strip()
    line = re.sub(r"\s+([?!,.])", r"\1", line)
    return re.sub(r"([¿¡]) ", r"\1", line)


def expansions(line: str) -> Iterator[str]:
    """All texts the alternatives of ``line`` allow."""
    found = _CHOICE.search(line)
    if found is None:
        yield line
        return
    for choice in found[1].split("|"):
        yield from expansions(line[: found.start()] + choice + line[found.end() :])


def variants(line: str) -> int:
    """How many texts the alternatives of ``line`` allow."""
    return math.prod(group.count("|") + 1 for group in _CHOICE.findall(line))


def invented_word(rng: Random) -> str:
    """A pronounceable word that means nothing, so that what was never seen counts as not known."""
    word = "".join(
        rng.choice(_ONSETS) + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "s", "l", "x"))
        for _ in range(rng.randint(2, 4))
    )
    return word.capitalize() if noise.happens(rng, 0.5) else word


class Corpus:
    """All phrasings, split once into those trained on and those held out.

    ``held_out`` is the share of the hand-written lines kept from training, spread evenly.
    """

    def __init__(self, held_out: float = HELD_OUT) -> None:
        self.answers = {(x.intent, x.lang): x.answer for x in published()}
        self.intents = list(dict.fromkeys(x.intent for x in published()))
        self._known = [intent for intent in self.intents if intent != UNKNOWN]
        self.frames = read_toml(HERE / "corpus" / "frames.toml")
        self.lines: dict[tuple[str, Lang], list[str]] = {}
        self.held_out: dict[tuple[str, Lang], list[str]] = {}
        self._slots: dict[Lang, dict[str, list[str]]] = {}
        self._templates: dict[Lang, list[str]] = {}
        for lang in LANGUAGES:
            unknown = read_toml(HERE / "corpus" / f"unknown_{lang}.toml")
            self._slots[lang], self._templates[lang] = unknown["slots"], unknown["templates"]
            known = read_toml(HERE / "corpus" / f"{lang}.toml") | {UNKNOWN: unknown["lines"]}
            if strange := set(known) - set(self.intents):
                raise ValueError(f"{lang}.toml has intents that are not published: {sorted(strange)}")
            for intent in self.intents:
                kept, held = _split(list(dict.fromkeys(known.get(intent, []))), held_out)
                self.lines[intent, lang] = kept
                self.held_out[intent, lang] = held
        for exchange in published():
            self.lines[exchange.intent, exchange.lang].append(exchange.question)
        self._weights = {
            key: list(accumulate(variants(line) ** 0.5 for line in lines)) for key, lines in self.lines.items()
        }

    def phrase(self, intent: str, lang: Lang, rng: Random) -> str:
        """A phrasing of ``intent``, alternatives and slots filled, not yet disturbed."""
        if intent == UNKNOWN and noise.happens(rng, 0.4):
            return self._fill(rng.choice(self._templates[lang]), lang, rng)
        line = expand(self._choose(intent, lang, rng), rng)
        if noise.happens(rng, 0.12):
            frame = self.frames[lang]
            if noise.happens(rng, 0.65):
                start = rng.choice(frame["before"])
                line = start + line[:1].lower() + line[1:]
            else:
                line = line.rstrip("?.!") + rng.choice(frame["after"])
        return line

    def exchange(self, rng: Random, lang: Lang, unknown: float) -> Exchange:
        """A random exchange; `unknown` with that probability, else all intents alike."""
        intent = UNKNOWN if rng.random() < unknown else rng.choice(self._known)
        question = noise.disturb(self.phrase(intent, lang, rng), rng)
        if noise.happens(rng, 0.04):
            question = published_question(intent, lang)
        return Exchange(intent=intent, lang=lang, question=question, answer=self.answers[intent, lang])

    def conversation(self, rng: Random, turns: int, unknown: float) -> Conversation:
        """``turns`` exchanges; one language as a rule; a system prompt in a quarter."""
        lang = rng.choice(LANGUAGES)
        system = None
        if noise.happens(rng, 0.25):
            spoken = lang if noise.happens(rng, 0.8) else rng.choice(LANGUAGES)
            system = expand(rng.choice(self.frames[spoken]["system"]), rng)
        exchanges = []
        for _ in range(turns):
            if noise.happens(rng, 0.08):
                lang = rng.choice(LANGUAGES)
            exchanges.append(self.exchange(rng, lang, unknown))
        return Conversation(system=system, exchanges=tuple(exchanges))

    def held_out_exchanges(self, rng: Random, copies: int = 3) -> Iterator[Exchange]:
        """Held-out lines, undisturbed, each in a few of its expansions."""
        for (intent, lang), lines in self.held_out.items():
            for text in sorted({expand(line, rng) for line in lines for _ in range(copies)}):
                yield Exchange(intent=intent, lang=lang, question=text, answer=self.answers[intent, lang])

    def _choose(self, intent: str, lang: Lang, rng: Random) -> str:
        """A line; one with many expansions comes oftener, by the square root of their number."""
        key = (intent, lang)
        return rng.choices(self.lines[key], cum_weights=self._weights[key])[0]

    def _fill(self, template: str, lang: Lang, rng: Random) -> str:
        slots = self._slots[lang]

        def value(found: re.Match[str]) -> str:
            if found[1] == "number":
                return str(rng.randint(2, 10 ** rng.randint(1, 4)))
            if found[1] == "word":
                return invented_word(rng)
            return invented_word(rng) if noise.happens(rng, 0.1) else rng.choice(slots[found[1]])

        return expand(_SLOT.sub(value, template), rng)


_PUBLISHED = {(x.intent, x.lang): x.question for x in published()}


def published_question(intent: str, lang: Lang) -> str:
    """The published question, to the letter."""
    return _PUBLISHED[intent, lang]


def _split(lines: list[str], share: float) -> tuple[list[str], list[str]]:
    """Lines to train on and lines held out, the latter taken at even distances from the middle."""
    if share == 0.0 or len(lines) < _SPLIT_FROM:
        return lines, []
    step = max(2, round(1 / share))
    held = set(range(step // 2, len(lines), step))
    return [x for i, x in enumerate(lines) if i not in held], [lines[i] for i in sorted(held)]
