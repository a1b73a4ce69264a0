"""What the context's sequences hold, and which beginning of a new prompt need not be read again."""

from __future__ import annotations

from collections.abc import Sequence

from tars_llamacpp.context import Context

_KEPT_TOKENS = 4096
"""Of idle sequences, beside the latest. A kept token slows every step: a 135M model's by 7 % for each 1,000."""

_WORTH_WAITING = 64
"""Tokens. Reading fewer costs less than a step."""


class Slot:
    """One of the context's sequences.

    ``tokens`` are those whose keys and values it holds; ``prompt`` what its user is going to read, and empty while
    nobody uses it.
    """

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.tokens: list[int] = []
        self.prompt: Sequence[int] = ()


class Cache:
    """The slots. One that nobody uses keeps what it holds, in case the next prompt begins alike."""

    def __init__(self, context: Context, slots: int, *, divisible: bool) -> None:
        self._context = context
        self._divisible = divisible
        self._idle = [Slot(sequence) for sequence in range(slots)]  # the least recently used first
        self._busy: list[Slot] = []

    def take(self, prompt: Sequence[int]) -> Slot | None:
        """Return an idle slot that holds the longest known beginning of ``prompt``, which is never all of it.

        ``None`` while all are busy, or while another request is still reading more of the same beginning.
        """
        if not self._idle:
            return None
        source, held = None, 0
        if self._divisible:
            source, held = self._longest(prompt)
            soon = max((_common(slot.prompt, prompt) for slot in self._busy), default=0)
            if soon - held >= _WORTH_WAITING:
                return None
        slot = self._idle[0]
        if source is not None and source in self._idle and held == len(source.tokens):
            slot = source  # nothing of what it holds is lost
        if slot is source:
            self._context.drop(slot.sequence, held)
        else:
            self._context.drop(slot.sequence)
            if source is not None:
                self._context.share(source.sequence, slot.sequence, held)
        slot.tokens = list(prompt[:held])
        slot.prompt = prompt
        self._idle.remove(slot)
        self._busy.append(slot)
        return slot

    def _longest(self, prompt: Sequence[int]) -> tuple[Slot | None, int]:
        lengths = [(_common(slot.tokens, prompt), slot) for slot in (*self._idle, *self._busy)]
        held, source = max(lengths, key=lambda pair: pair[0])
        held = min(held, len(prompt) - 1)  # the last one must be computed: its logits are wanted
        return (source, held) if held else (None, 0)

    def give_back(self, slot: Slot) -> None:
        """Keep what ``slot`` holds for later, within bounds."""
        slot.prompt = ()
        self._busy.remove(slot)
        self._idle.append(slot)
        kept = 0
        for other in reversed(self._idle[:-1]):
            kept += len(other.tokens)
            if kept > _KEPT_TOKENS:
                self._forget(other)

    def forget_idle(self) -> bool:
        """Make room; ``False`` where nothing was kept."""
        kept = [slot for slot in self._idle if slot.tokens]
        for slot in kept:
            self._forget(slot)
        return bool(kept)

    def _forget(self, slot: Slot) -> None:
        self._context.drop(slot.sequence)
        slot.tokens = []


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
