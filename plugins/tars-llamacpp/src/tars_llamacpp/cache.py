"""What the context's sequences hold, and which beginning of a new prompt need not be read again.

Prompts are read, kept and shared in whole pieces. So a request is computed in the same steps whether its beginning was
known or not, and gives the same text with the same seed: sharing to the token changed one sampled answer in ten,
because one row is multiplied in another order than several.
"""

from __future__ import annotations

from collections.abc import Sequence

from tars_llamacpp.context import Context

_KEPT_TOKENS = 4096
"""Of idle sequences, beside the latest. A kept token slows every step: a 135M model's by 7 % for each 1,000."""


class Slot:
    """One of the context's sequences: its user's prompt, and how many tokens of it and of the answer it holds.

    While nobody uses it, the prompt is what it has kept.
    """

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.prompt: Sequence[int] = ()
        self.length = 0


class Cache:
    """The slots. One that nobody uses keeps the whole pieces of its prompt, in case the next one begins alike.

    A model that is not ``divisible`` keeps nothing.
    """

    def __init__(self, context: Context, slots: int, *, piece: int, divisible: bool) -> None:
        self._context = context
        self._piece = piece
        self._divisible = divisible
        self._idle = [Slot(sequence) for sequence in range(slots)]  # the least recently used first
        self._busy: list[Slot] = []

    def take(self, prompt: Sequence[int]) -> Slot | None:
        """Return a slot that holds the longest known beginning of ``prompt``, which is never all of it.

        ``None`` while all are busy, or while another request is still reading more of the same beginning.
        """
        if not self._idle:
            return None
        source, held = max(
            ((slot, min(self._shared(slot, prompt), slot.length)) for slot in (*self._idle, *self._busy)),
            key=lambda pair: pair[1],
        )
        if any(self._shared(slot, prompt) > held for slot in self._busy):
            return None
        slot = next((slot for slot in self._idle if not slot.length), self._idle[0])
        if source in self._idle and held == source.length:
            slot = source  # nothing of what it keeps is lost
        if slot is source:
            self._context.drop(slot.sequence, held)
        else:
            self._context.drop(slot.sequence)
            if held:
                self._context.share(source.sequence, slot.sequence, held)
        slot.prompt, slot.length = prompt, held
        self._idle.remove(slot)
        self._busy.append(slot)
        return slot

    def _shared(self, slot: Slot, prompt: Sequence[int]) -> int:
        # The last token is always read: its logits are wanted.
        return self._whole(min(_common(slot.prompt, prompt), len(prompt) - 1))

    def _whole(self, length: int) -> int:
        return length // self._piece * self._piece if self._divisible else 0

    def give_back(self, slot: Slot) -> None:
        """Keep what others could share, within bounds."""
        self._keep(slot, self._whole(min(slot.length, len(slot.prompt))))
        self._busy.remove(slot)
        self._idle.append(slot)
        kept = 0
        for other in reversed(self._idle[:-1]):
            kept += other.length
            if kept > _KEPT_TOKENS:
                self._keep(other, 0)

    def forget_idle(self) -> bool:
        """Make room; ``False`` where nothing was kept."""
        kept = [slot for slot in self._idle if slot.length]
        for slot in kept:
            self._keep(slot, 0)
        return bool(kept)

    def _keep(self, slot: Slot, length: int) -> None:
        self._context.drop(slot.sequence, length)
        slot.prompt, slot.length = slot.prompt[:length], length


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    for at, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return at
    return min(len(one), len(other))
