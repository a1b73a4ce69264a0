"""Measure the committed master and write the figures to ``results.json``.

An answer counts only when it is right to the letter. Greedy decoding gives exactly the expected answer if and
only if, with the expected answer as input, every token is the most likely one; so one pass over question and
answer decides, and the chance of the same answer under sampling is a product over its tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import noise
import torch
from checkpoint import WEIGHTS, write_results
from corpus import HERE, LANGUAGES, UNKNOWN, Conversation, Corpus, Exchange, Lang, expansions, published, read_toml
from report import update_readme
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

SYSTEM = {
    "es": "Eres una IA. Responde brevemente.",
    "en": "You are an AI. Answer briefly.",
}
PENALTY, WINDOW = 1.1, 64
"""The framework's defaults: repeat_penalty, and how many tokens back it looks."""
TOP_K, TOP_P, TEMPERATURE = 40, 0.9, 0.8


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How one answer fared: greedy, greedy with repeat_penalty, and its chance with default sampling."""

    greedy: bool
    penalised: bool
    chance: float


class Judge:
    """Runs the checkpoint folder with transformers."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.parameters: int = self._model.num_parameters()

    def judge(self, talk: Conversation) -> list[Verdict]:
        """A verdict per exchange, each with the earlier exchanges as they should have been."""
        messages: list[dict[str, str]] = []
        if talk.system is not None:
            messages.append({"role": "system", "content": talk.system})
        spans, ids = [], []
        for exchange in talk.exchanges:
            messages.append({"role": "user", "content": exchange.question})
            prompt = self._ids(messages, answer_next=True)
            messages.append({"role": "assistant", "content": exchange.answer})
            ids = self._ids(messages, answer_next=False)[:-1]  # up to the end token, without the newline
            spans.append((len(prompt), len(ids)))
        with torch.inference_mode():
            logits = self._model(torch.tensor([ids])).logits[0]
        return [self._verdict(logits, ids, start, stop) for start, stop in spans]

    def _ids(self, messages: list[dict[str, str]], *, answer_next: bool) -> list[int]:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    @staticmethod
    def _verdict(logits: Tensor, ids: list[int], start: int, stop: int) -> Verdict:
        """Follow the answer ``ids[start:stop]``; ``logits`` ``[T, V]``."""
        greedy = penalised = True
        chance = 1.0
        for at in range(start, stop):
            row, token = logits[at - 1], ids[at]
            greedy = greedy and int(row.argmax()) == token
            row = repeat_penalty(row, ids[max(0, at - WINDOW) : at])
            penalised = penalised and int(row.argmax()) == token
            chance *= chance_of(row, token)
        return Verdict(greedy=greedy, penalised=penalised, chance=chance)


def repeat_penalty(row: Tensor, recent: Sequence[int]) -> Tensor:
    """llama.cpp's: the logits ``[V]`` of recent tokens divided by the penalty, or times it if negative."""
    seen = torch.tensor(sorted(set(recent)))
    changed = row.clone()
    values = row[seen]
    changed[seen] = torch.where(values > 0, values / PENALTY, values * PENALTY)
    return changed


def chance_of(row: Tensor, token: int) -> float:
    """Probability of ``token`` under top_k, then top_p, then temperature, in llama.cpp's order."""
    values, tokens = row.topk(TOP_K)
    before = values.softmax(dim=-1).cumsum(dim=-1) - values.softmax(dim=-1)
    kept = before < TOP_P
    place = (tokens == token).nonzero()
    if len(place) == 0 or not kept[place[0, 0]]:
        return 0.0
    shares = (values[kept] / TEMPERATURE).softmax(dim=-1)
    return float(shares[place[0, 0]])


def each(exchanges: Iterable[Exchange], *, system: bool = False) -> Iterator[Conversation]:
    """Every exchange as a conversation of its own."""
    for exchange in exchanges:
        yield Conversation(system=SYSTEM[exchange.lang] if system else None, exchanges=(exchange,))


def mistyped(exchanges: Iterable[Exchange], rng: Random) -> list[Exchange]:
    """The same questions with two to four typing mistakes each."""
    return [replace(x, question=noise.mistype_some(noise.mistype_some(x.question, rng), rng)) for x in exchanges]


def six_published(rng: Random, count: int = 100) -> list[Conversation]:
    """Conversations of six published questions, each in one language, no question twice."""
    talks = []
    for i in range(count):
        lang = LANGUAGES[i % 2]
        chosen = rng.sample([x for x in published() if x.lang == lang], 6)
        talks.append(Conversation(system=None, exchanges=tuple(chosen)))
    return talks


def independent() -> tuple[list[Exchange], list[Exchange], list[Conversation]]:
    """The test set written by somebody else: known questions, unknown ones, six-turn conversations."""
    table = read_toml(HERE / "independent.toml")
    answers = {(x.intent, x.lang): x.answer for x in published()}

    def exchange(intent: str, lang: Lang, question: str) -> Exchange:
        return Exchange(intent=intent, lang=lang, question=question, answer=answers[intent, lang])

    known = [
        exchange(intent, lang, question)
        for intent, entry in table["phrasings"].items()
        for lang, questions in entry.items()
        for question in questions
    ]
    unknown = [exchange(UNKNOWN, lang, x) for lang, questions in table["unknown"].items() for x in questions]
    talks = []
    for entry in table["conversation"]:
        pairs = [pair if pair[0] in table["phrasings"] or pair[0] == UNKNOWN else pair[::-1] for pair in entry["turns"]]
        exchanges = tuple(exchange(intent, entry["lang"], question) for intent, question in pairs)
        talks.append(Conversation(system=None, exchanges=exchanges))
    return known, unknown, talks


def bare(text: str) -> str:
    """``text`` in lower case, without accents and marks, to compare wordings."""
    return " ".join(re.findall(r"\w+", noise.drop_accents(text).lower()))


def not_in(corpus: Corpus, exchanges: Iterable[Exchange]) -> list[Exchange]:
    """Those whose wording training never saw, not even by chance in somebody else's phrasing."""
    seen = {bare(text) for lines in corpus.lines.values() for line in lines for text in expansions(line)}
    return [x for x in exchanges if bare(x.question) not in seen]


def summary(judge: Judge, talks: Iterable[Conversation]) -> dict[str, float | int]:
    """Percentages over all answers of ``talks``."""
    verdicts = [verdict for talk in talks for verdict in judge.judge(talk)]
    return {
        "questions": len(verdicts),
        "greedy": percent(v.greedy for v in verdicts),
        "repeat_penalty": percent(v.penalised for v in verdicts),
        "sampled": round(100 * statistics.fmean(v.chance for v in verdicts), 1),
    }


def turns_summary(judge: Judge, talks: Sequence[Conversation]) -> dict[str, Any]:
    """Percentages of answers right, of sixth answers right, and of conversations right throughout."""
    judged = [judge.judge(talk) for talk in talks]
    return {
        "conversations": len(talks),
        "answers": percent(v.greedy for verdicts in judged for v in verdicts),
        "sixth_answer": percent(verdicts[-1].greedy for verdicts in judged),
        "whole": percent(all(v.greedy for v in verdicts) for verdicts in judged),
        "answers_repeat_penalty": percent(v.penalised for verdicts in judged for v in verdicts),
    }


def draws(seed: int) -> Random:
    """A seeded generator, so that every run measures the same questions."""
    return Random(seed)  # noqa: S311 - not for secrets


def percent(flags: Iterable[bool]) -> float:
    """Share of true ones in percent, to one decimal."""
    values = list(flags)
    return round(100 * sum(values) / len(values), 1)


def by_intent(judge: Judge, exchanges: Iterable[Exchange]) -> dict[str, str]:
    """``right/asked`` per intent, greedy, those with mistakes only."""
    counts: dict[str, list[bool]] = {}
    for talk in each(exchanges):
        counts.setdefault(talk.exchanges[0].intent, []).append(judge.judge(talk)[0].greedy)
    return {k: f"{sum(v)}/{len(v)}" for k, v in sorted(counts.items()) if not all(v)}


def evaluate(judge: Judge) -> dict[str, Any]:
    """All figures of the README's table."""
    corpus = Corpus()
    held = list(corpus.held_out_exchanges(draws(1)))
    held_known = [x for x in held if x.intent != UNKNOWN]
    held_unknown = [x for x in held if x.intent == UNKNOWN]
    known, unknown, talks = independent()
    return {
        "published": summary(judge, each(published())),
        "published_with_system_prompt": summary(judge, each(published(), system=True)),
        "published_six_turns": turns_summary(judge, six_published(draws(2))),
        "own_held_out_lines": summary(judge, each(held_known)),
        "own_held_out_lines_mistyped": summary(judge, each(mistyped(held_known, draws(3)))),
        "own_held_out_unknown": summary(judge, each(held_unknown)),
        "independent": summary(judge, each(known)),
        "independent_wording_never_trained": summary(judge, each(not_in(corpus, known))),
        "independent_mistyped": summary(judge, each(mistyped(known, draws(4)))),
        "independent_unknown": summary(judge, each(unknown)),
        "independent_unknown_wording_never_trained": summary(judge, each(not_in(corpus, unknown))),
        "independent_six_turns": turns_summary(judge, talks),
        "independent_mistakes_by_intent": by_intent(judge, known),
    }


def main() -> None:
    """Measure, print, and note the figures if it is the committed master."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the checkpoint folder to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(arguments.weights)
    figures = evaluate(judge)
    print(json.dumps(figures, indent=2))
    if arguments.weights == WEIGHTS:
        write_results("evaluation", figures)
        update_readme()


if __name__ == "__main__":
    main()
