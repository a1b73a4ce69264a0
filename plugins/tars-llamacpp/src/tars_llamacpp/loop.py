"""One loop for all requests: each step decodes a token of every answer and a piece of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tars_core.plugin import (
    Answer,
    GenerateRequest,
    GenerationFailed,
    GGUFHeader,
    LoadedModel,
    Progress,
    Report,
)
from tars_llamacpp import log
from tars_llamacpp.cache import Cache, Slot
from tars_llamacpp.context import Context, Row
from tars_llamacpp.plugin import FEATURES
from tars_llamacpp.sampling import Sampler
from tars_llamacpp.tokens import Vocabulary

_NO_ROOM = 1


class _Sequence:
    """A request on its way."""

    def __init__(self, request_id: int, prompt: list[int], sampler: Sampler, answer: Answer) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.sampler = sampler
        self.answer = answer
        self.slot: Slot | None = None  # until it is its turn to be read
        self.next_token: int | None = None  # sampled, not decoded; None while the prompt is read
        self.cancelled = False


class _Feed(NamedTuple):
    """What one sequence contributes to a step; ``row`` is where its logits come out, if the prompt is complete."""

    sequence: _Sequence
    slot: Slot
    tokens: list[int]
    row: int | None


class _Step:
    """One batch in the making."""

    def __init__(self) -> None:
        self.feeds: list[_Feed] = []
        self.rows: list[Row] = []

    def add(self, sequence: _Sequence, slot: Slot, tokens: list[int], *, complete: bool) -> None:
        """Append ``tokens``; the logits of the last are wanted where they complete what is to be read."""
        start, last = slot.length, len(tokens) - 1
        self.rows += [
            Row(token, start + at, slot.sequence, wants_logits=complete and at == last)
            for at, token in enumerate(tokens)
        ]
        self.feeds.append(_Feed(sequence, slot, tokens, len(self.rows) - 1 if complete else None))


class LoopedModel(LoadedModel):
    """A model in memory. Implements the batched form of the contract.

    Prompts are read one after the other, oldest first, ``piece`` tokens a step: so the first answer begins early, and
    a beginning that several prompts share is read once.
    """

    def __init__(  # noqa: PLR0913 - each is one fact about the model
        self,
        context: Context,
        header: GGUFHeader,
        *,
        device: str,
        context_length: int,
        context_shrunk: bool,
        slots: int,
        piece: int,
        divisible: bool,
    ) -> None:
        vocabulary = Vocabulary(context.vocab)
        super().__init__(
            device=device,
            context_length=context_length,
            concurrency=slots,
            features=FEATURES,
            header=header,
            longest_token=vocabulary.longest,
            context_shrunk=context_shrunk,
        )
        self._context = context
        self._vocabulary = vocabulary
        self._cache = Cache(context, slots, piece=piece, divisible=divisible)
        self._piece = piece
        self._sequences: list[_Sequence] = []  # the oldest first

    def tokenize(self, text: str) -> Sequence[int]:
        """Return the tokens of ``text``."""
        return self._vocabulary.tokenize(text)

    def prepare(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request: the core has tokenised the prompt."""
        return request

    def submit(self, request_id: int, prepared: GenerateRequest) -> None:
        """Queue the request."""
        answer = Answer(self._vocabulary.decoder(), prepared)
        sampler = Sampler(self._vocabulary, prepared.sampling, prepared.tokens)
        self._sequences.append(_Sequence(request_id, list(prepared.tokens), sampler, answer))

    def step(self) -> Sequence[Report]:
        """Decode one batch and sample from it."""
        reported: list[Report] = []
        for sequence in [s for s in self._sequences if s.cancelled]:
            reported += [(sequence.request_id, event) for event in sequence.answer.finish("cancelled")]
            self._end(sequence)
        step = self._plan()
        if not step.rows or not self._decode(step.rows, reported):
            return reported
        for sequence, slot, tokens, row in step.feeds:
            slot.length += len(tokens)
            if row is not None:
                sequence.next_token = sequence.sampler.sample(self._context, row)
                ends = self._vocabulary.ends(sequence.next_token)
                events = sequence.answer.push(sequence.next_token, ends=ends)
                reported += [(sequence.request_id, event) for event in events]
                if sequence.answer.finished:
                    self._end(sequence)
        reported += [
            (s.request_id, Progress(prompt_tokens_done=s.slot.length if s.slot else 0))
            for s in self._sequences
            if s.next_token is None
        ]
        return reported

    def cancel(self, request_id: int) -> None:
        """Mark the request; the next step ends it."""
        for sequence in self._sequences:
            sequence.cancelled |= sequence.request_id == request_id

    def close(self) -> None:
        """Free all memory."""
        for sequence in list(self._sequences):
            self._end(sequence)
        self._context.close()

    def _plan(self) -> _Step:
        """Choose what to decode: the last token of every answer, and as much of the prompts as a step may hold."""
        step = _Step()
        for sequence in self._sequences:
            if sequence.slot is not None and sequence.next_token is not None:
                step.add(sequence, sequence.slot, [sequence.next_token], complete=True)
        room = self._piece
        for sequence in self._sequences:
            if sequence.next_token is not None:
                continue
            sequence.slot = slot = sequence.slot or self._cache.take(sequence.prompt)
            if slot is None:
                continue
            end = slot.length + self._piece
            tokens = sequence.prompt[slot.length : end]
            if len(tokens) <= room:
                room -= len(tokens)
                step.add(sequence, slot, tokens, complete=end >= len(sequence.prompt))
        return step

    def _decode(self, rows: list[Row], reported: list[Report]) -> bool:
        """Compute the batch; ``False`` where nothing was computed and one request had to go for want of room."""
        code = self._context.decode(rows)
        if code == _NO_ROOM and self._cache.forget_idle():
            code = self._context.decode(rows)
        if code == 0:
            return True
        if code == _NO_ROOM:
            latest = next(s for s in reversed(self._sequences) if s.slot is not None)
            reported.append((latest.request_id, GenerationFailed("llama.cpp's key-value cache has no room left")))
            self._end(latest)
            return False
        # What the cache holds now is unknown: everybody begins anew.
        for sequence in list(self._sequences):
            self._end(sequence)
        self._cache.forget_idle()
        self._context.clear()
        raise GenerationFailed(f"llama.cpp cannot decode (code {code}): {'; '.join(log.errors()[-2:])}")

    def _end(self, sequence: _Sequence) -> None:
        self._sequences.remove(sequence)
        sequence.sampler.close()
        if sequence.slot is not None:
            self._cache.give_back(sequence.slot)
