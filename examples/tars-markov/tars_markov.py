"""Words by chance: one that followed the last one in a file (``tars run -m markov:book.txt "Once upon a"``)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from tars_core.plugin import (
    BackendEvent,
    CancelFlag,
    GenerateRequest,
    LoadedModel,
    ModelRef,
    ProbeReport,
    hookimpl,
    probe_file,
    say,
)


class Book(LoadedModel):
    def __init__(self, words: list[str]) -> None:
        super().__init__(device="cpu", context_length=4096)
        self.words = words

    def after(self, word: str, seed: int | None) -> Iterator[str]:
        chance = random.Random(seed)
        while followers := [second for first, second in pairwise(self.words) if first == word]:
            word = chance.choice(followers)
            yield f" {word}"


@hookimpl
def tars_probe(model: ModelRef | None) -> ProbeReport | None:
    return probe_file(model, "markov")


@hookimpl
def tars_load(model: ModelRef) -> LoadedModel:
    return Book(Path(model.rest).read_text("utf-8").split())


@hookimpl
def tars_generate(loaded: Book, request: GenerateRequest, cancel: CancelFlag) -> Iterator[BackendEvent]:
    words = request.prompt.split()
    return say(loaded.after(words[-1], request.sampling.seed), request, cancel, loaded, prompt_tokens=len(words))
