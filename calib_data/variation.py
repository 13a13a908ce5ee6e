"""Texts like given ones that are none of them: more to learn from where there are few.

A student that meets a small corpus several times learns its texts by heart. What a teacher says of an
altered text is as true as what it says of the text, so a distilled model can learn from both. The
alterations are those of EDA (Wei and Zou 2019, arXiv:1901.11196) that need no dictionary, with words
from the corpus itself, and joining halves of two texts.
"""

import random
from collections.abc import Callable, Sequence

_DROPPED = 0.15  # the share of words that go
_REPLACED = 0.2  # or become others
_LONG = 48  # words of a text that may begin later: readers of it see no more than its beginning
_LEFT = 40  # words that are then left, at least


def varied(text: str, turn: int, source: Sequence[str]) -> str:
    """Return `text` altered: without some words, with others, or as half of it and half of another.

    The others are of `source`, the texts among which `text` is. The same text in the same `turn`
    always becomes the same. Spaces are where words begin; a text that is one word is joined.
    """
    draw = random.Random(f"{turn} {text}")
    words = text.split()
    if len(words) > _LONG:
        words = words[draw.randrange(len(words) - _LEFT + 1) :]
    change = draw.choice((_thinned, _replaced, _joined)) if len(words) > 1 else _joined
    return " ".join(change(words, draw, lambda: draw.choice(source).split()))


def _thinned(words: list[str], draw: random.Random, _: Callable[[], list[str]]) -> list[str]:
    gone = _some(words, _DROPPED, draw)
    return [word for i, word in enumerate(words) if i not in gone]


def _replaced(words: list[str], draw: random.Random, other: Callable[[], list[str]]) -> list[str]:
    changed = _some(words, _REPLACED, draw)
    return [draw.choice(other()) if i in changed else word for i, word in enumerate(words)]


def _some(words: list[str], share: float, draw: random.Random) -> set[int]:
    """Return the places of a share of the words, of one at least."""
    return set(draw.sample(range(len(words)), max(1, round(share * len(words)))))


def _joined(words: list[str], draw: random.Random, other: Callable[[], list[str]]) -> list[str]:
    share = draw.random()
    second = other()
    return words[: max(1, round(share * len(words)))] + second[round(share * len(second)) :]
