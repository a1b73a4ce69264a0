"""What people do to a sentence on the way to the keyboard, as seeded random edits."""

from __future__ import annotations

import unicodedata
from random import Random

_LONG = 4
"""Letters from which a word counts as long: it is mistyped, not lost."""
_SENTENCE = 5
"""Words from which a text bears losing or swapping one."""
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NEIGHBOURS = {
    key: "".join(row[max(0, i - 1) : i] + row[i + 1 : i + 2])
    for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    for i, key in enumerate(row)
}


def happens(rng: Random, share: float) -> bool:
    """True in ``share`` of all cases."""
    return rng.random() < share


def drop_accents(text: str) -> str:
    """``¿Qué tal, señor?`` becomes ``¿Que tal, señor?``: the ñ stays, as it has its own key."""
    kept = text.replace("ñ", "\0").replace("Ñ", "\1")
    bare = "".join(c for c in unicodedata.normalize("NFD", kept) if not unicodedata.combining(c))
    return bare.replace("\0", "ñ").replace("\1", "Ñ")


def mistype(word: str, rng: Random) -> str:
    """One slip of the finger inside ``word``: swapped, lost, doubled or wrong letter."""
    at = rng.randrange(len(word) - 1)
    before, letter, after = word[:at], word[at], word[at + 1 :]
    slips = (
        after[0] + letter + after[1:],
        letter + after[1:],
        letter + letter + after,
        rng.choice(_NEIGHBOURS.get(letter.lower(), _LETTERS)) + after,
    )
    return before + rng.choice(slips)


def mistype_some(text: str, rng: Random) -> str:
    """One or two slips in ``text``, in words of four letters or more."""
    words = text.split(" ")
    for _ in range(1 if happens(rng, 0.7) else 2):
        long = [i for i, word in enumerate(words) if len(word) >= _LONG]
        if long:
            chosen = rng.choice(long)
            words[chosen] = mistype(words[chosen], rng)
    return " ".join(words)


def disturb_words(text: str, rng: Random) -> str:
    """Lose a word of three letters or fewer, or swap two neighbours, in a text of five words or more."""
    words = text.split(" ")
    if len(words) < _SENTENCE:
        return text
    short = [i for i, word in enumerate(words) if len(word) < _LONG and word.isalpha()]
    if short and happens(rng, 0.7):
        del words[rng.choice(short)]
    else:
        at = rng.randrange(len(words) - 1)
        words[at], words[at + 1] = words[at + 1], words[at]
    return " ".join(words)


def punctuate(text: str, rng: Random) -> str:
    """Leave out or vary the marks: the opening ¿ and ¡ first, as most people do, then the closing ones."""
    if happens(rng, 0.35):
        text = text.replace("¿", "").replace("¡", "")
    if happens(rng, 0.25):
        text = text.rstrip("?!.")
    elif happens(rng, 0.05):
        text = text.rstrip("?!.") + rng.choice(("??", " ?", "...", "?!", ".", "!", "?"))
    if happens(rng, 0.25):
        text = text.replace(",", "").replace(";", "").replace(":", "")
    if happens(rng, 0.5):
        text = text.replace("'", "’") if happens(rng, 0.3) else text.replace("'", "")
    return text


def recase(text: str, rng: Random) -> str:
    """Lower case often, capitals rarely."""
    if happens(rng, 0.4):
        return text.lower()
    return text.upper() if happens(rng, 0.03) else text


def disturb(text: str, rng: Random) -> str:
    """All of the above at the rates the demo model is trained with."""
    text = punctuate(text, rng)
    if happens(rng, 0.25):
        text = drop_accents(text)
    if happens(rng, 0.08):
        text = disturb_words(text, rng)
    if happens(rng, 0.18):
        text = mistype_some(text, rng)
    return recase(text, rng).strip() or text
