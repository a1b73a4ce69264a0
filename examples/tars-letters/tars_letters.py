"""Letters by their frequency after the last one, for many requests at once (``tars run -m letters:book.txt "On"``)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from tars_core.plugin import (
    BASIC_FEATURES,
    Answer,
    BackendEvent,
    CancelFlag,
    GenerateRequest,
    InterleavedModel,
    LoadedModel,
    ModelRef,
    ProbeReport,
    Sampler,
    hookimpl,
    probe_file,
)


class Letters(InterleavedModel):
    def __init__(self, text: str) -> None:
        features = BASIC_FEATURES | {"token_ids", "tokenize"}
        super().__init__(device="cpu", context_length=2048, concurrency=8, features=features)
        self.letters = sorted(set(text))
        self.counts = Counter(pairwise(text))

    def tokenize(self, text: str) -> list[int]:
        return [self.letters.index(letter) for letter in text if letter in self.letters]

    def generate(self, request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
        answer, sampler = Answer(self.letters.__getitem__, request), Sampler(request.sampling, request.tokens)
        last = request.tokens[-1]
        while not answer.finished and not cancel.is_set():
            follows = [self.counts[self.letters[last], letter] for letter in self.letters]
            last = sampler.choose([math.log(count + 0.01) for count in follows])
            yield from answer.push(last)
        if not answer.finished:
            yield from answer.finish("cancelled")


@hookimpl
def tars_probe(model: ModelRef | None) -> ProbeReport | None:
    return probe_file(model, "letters")


@hookimpl
def tars_load(model: ModelRef) -> LoadedModel:
    return Letters(Path(model.rest).read_text("utf-8"))
